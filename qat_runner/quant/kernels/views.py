"""Tensors in the memory layout that kernels loop over: no gaps, one row after another."""

from typing import overload

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Return x if its memory has no gaps and its rows (dimension 0) lie one after another; otherwise such a copy."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def in_layout_of(other: Tensor, x: Tensor) -> Tensor:
    """Return `other`, of x's shape, in the element order of x, which is dense; copied only if the order differs."""
    if other.stride() == x.stride() or (other.is_contiguous() and x.is_contiguous()):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def rows_and_length(x: Tensor, s: Tensor, parts: int = 1) -> tuple[int, int] | None:
    """Return (rows, elements per row) if x has one scalar, or one per index of dimension 0; otherwise None.

    Args:
        x: dense; None is returned if it is empty.
        s: the scalars, or `parts` times as many, stacked.
    """
    n, rows = x.numel(), s.numel() // parts
    if n == 0:
        return None
    if rows == 1:
        return 1, n
    of_one = s.shape[parts > 1 :]
    return (rows, n // rows) if len(of_one) == x.ndim and of_one[0] == rows == x.shape[0] else None


@overload
def floats(t: Tensor) -> Tensor: ...


@overload
def floats(t: None) -> None: ...


def floats(t: Tensor | None) -> Tensor | None:
    """Return scalars as kernels expect them: float32, contiguous."""
    return t if t is None or (t.dtype is torch.float32 and t.is_contiguous()) else t.to(torch.float32).contiguous()
