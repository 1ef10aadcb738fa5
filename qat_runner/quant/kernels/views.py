"""Tensors as rows in memory order, which is all that elementwise loops and sums need to know."""

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous, the two that are told apart."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def rows_of(x: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """x as dense [rows, n], one scalar a row: one row if a scalar spans all `dims`, or one an index of dimension 0.

    None for other granularities, and for an empty x. A copy only if x has gaps.
    """
    x = x.detach()
    if x.numel() == 0 or dims not in (tuple(range(x.ndim)), tuple(range(1, x.ndim))):
        return None
    return _in_memory_order(x, memory_format(x)).reshape(1 if len(dims) == x.ndim else x.shape[0], -1)


def rows_beside(other: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """A tensor of x's shape as rows that match those of x, element by element, whatever its own memory format."""
    return _in_memory_order(other.detach(), memory_format(x)).reshape(rows.shape)


def _in_memory_order(x: Tensor, layout: torch.memory_format) -> Tensor:
    x = x.contiguous(memory_format=layout)
    return x.permute(0, 2, 3, 1) if layout == torch.channels_last else x


def with_scalars(x: Tensor, s: Tensor, parts: int = 1) -> tuple[Tensor, Tensor] | None:
    """x as [rows, n] and s, float32, as dense [rows], or [parts, rows]; None for other granularities."""
    s = s.detach().to(torch.float32)
    of_one = s if parts == 1 else s[0]
    if of_one.numel() == 1:
        rows = rows_of(x, tuple(range(x.ndim)))
    elif of_one.ndim == x.ndim and of_one.numel() == of_one.shape[0] == x.shape[0]:
        rows = rows_of(x, tuple(range(1, x.ndim)))
    else:
        rows = None
    return None if rows is None else (rows, (s.reshape(-1) if parts == 1 else s.reshape(parts, -1)).contiguous())


def like(rows: Tensor, x: Tensor) -> Tensor:
    """[rows, n] back in the shape and memory format of x."""
    if memory_format(x) == torch.channels_last:
        n, c, h, w = x.shape
        return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return rows.reshape(x.shape)


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
