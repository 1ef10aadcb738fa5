"""Clipping intervals of formats with two ends, low <= 0 <= high: what `clipping` does for one scalar.

Results are stacked, [2, *shape of a scalar], in the dtype of `clipping`. Where the format is unsigned low is 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.formats import Format
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, kept


def extremes(x: Tensor, format: Format, dims: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """The smallest and the largest element of each row, zero among them.

    Args:
        x: at least one dimension, any floating dtype.
        format: with two ends.
        dims: what one interval spans, kept with size 1; none: each element is a row.
        pool: what x is a part of; None: it is all there is.
    """
    if math.prod([x.shape[d] for d in dims]) == 0:
        return x.new_zeros((2, *kept(x, dims)), dtype=compute_dtype(x))
    high = (x.amax(dims, keepdim=True) if dims else x).clamp(min=0)
    low = (x.amin(dims, keepdim=True) if dims else x).clamp(max=0) if format.signed else torch.zeros_like(high)
    ends = torch.stack([low, high]).to(compute_dtype(x))
    if pool is not None:
        ends = torch.stack([-pool.largest(-ends[0]), pool.largest(ends[1])])
    return ends


def percentiles(x: Tensor, format: Format, dims: tuple[int, ...], rank: Callable[[Tensor], Tensor]) -> Tensor:
    """The q-th percentile of x and, below, that of -x, zero among them.

    Args:
        x, format, dims: as of `extremes`.
        rank: rows [rows, n], which it may leave in disorder -> the q-th percentile of each, [rows].
    """
    shape = kept(x, dims)
    if x.numel() == 0:
        return x.new_zeros((2, *shape), dtype=compute_dtype(x))
    spanned = [d for d in range(x.ndim) if d not in dims]
    rows = x.permute(*spanned, *dims).reshape(math.prod(shape), -1).to(compute_dtype(x))
    high = rank(rows.clone()).clamp(min=0)
    low = -rank(-rows).clamp(min=0) if format.signed else torch.zeros_like(high)
    return torch.stack([low, high]).reshape(2, *shape)


def mse_sweep(x: Tensor, format: Format, dims: tuple[int, ...], points: int, together: bool) -> Tensor:
    """The best of `points` shares k/points of both extremes at once; then of the lower end alone, then of the upper.

    Args:
        x, format, dims: as of `extremes`.
        points: candidates each time.
        together: rows share their shares, the least total squared error deciding; false: each row has its own.
    """
    top = extremes(x, format, dims)
    if x.numel() == 0:
        return top
    wide = x.to(compute_dtype(x))
    ends = top
    for sides in ((0, 1), (0,), (1,)):
        candidates = [_shared(ends, top, sides, k / points) for k in range(1, points + 1)]
        errors = [(format.fake_quantize(wide, c) - wide).square_() for c in [ends, *candidates]]
        cost = torch.stack([e.sum(dims, keepdim=True) if dims else e for e in errors])
        if together:
            cost = cost.flatten(1).sum(1).reshape(-1, *[1] * x.ndim).expand(cost.shape)
        best = cost.argmin(0, keepdim=True)
        ends = torch.stack([torch.stack([c[i] for c in [ends, *candidates]]).gather(0, best)[0] for i in (0, 1)])
    return ends


def _shared(ends: Tensor, top: Tensor, sides: Sequence[int], share: float) -> Tensor:
    return torch.stack([top[i] * share if i in sides else ends[i] for i in (0, 1)])


def octav(
    x: Tensor,
    format: Format,
    dims: tuple[int, ...],
    guess: Tensor | None,
    iterations: int,
    tolerance: float,
    pool: Pool | None,
) -> Tensor:
    """OCTAV in two unknowns: the interval that minimizes

        J(low, high) = k (high - low)^2 #{low <= x <= high, x != 0} + sum (x - high)+^2 + sum (low - x)+^2

    with the indicators held constant, as the paper differentiates: k (high - low) # = sum (x - high)+ = sum (low - x)+.
    `kernels.intervals` says how that is solved.

    Args:
        x, format, dims, pool: as of `extremes`; x has elements, and a row more than one.
        guess: where to begin, [2, ...]; None: at the extremes.
        iterations: reads of x after the start.
        tolerance: reading ends when no end moves by more than this share of the width, where looking is free.
    """
    top = extremes(x, format, dims, pool)
    return kernels.backend(x).octav_interval(x, top, guess, format.rounding_noise, dims, iterations, tolerance, pool)
