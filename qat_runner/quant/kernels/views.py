"""Tensors as the memory that kernels loop over: without gaps, rows one behind another."""

from typing import overload

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x where its memory has no gaps, and rows, one an index of dimension 0, lie one behind another; or such a copy."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def beside(other: Tensor, x: Tensor) -> Tensor:
    """A tensor of x's shape with its elements where x, which is dense, has them; a copy only if they are not."""
    if other.stride() == x.stride() or (other.is_contiguous() and x.is_contiguous()):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def extent(x: Tensor, s: Tensor, parts: int = 1) -> tuple[int, int] | None:
    """Rows and elements of a row, where x has one scalar, or one an index of dimension 0; None for other granularities.

    Args:
        x: dense; an empty one has no rows.
        s: scalars, or `parts` times as many, stacked.
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
    """Scalars as kernels take them: float32, dense."""
    return t if t is None or (t.dtype is torch.float32 and t.is_contiguous()) else t.to(torch.float32).contiguous()
