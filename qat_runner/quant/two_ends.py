"""Clipping intervals of formats with two ends, low <= 0 <= high: what `clipping` does for one scalar.

Results are stacked, [2, *shape of a scalar], in the dtype of `clipping`. Where the format is unsigned low is 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat_runner.quant import kernels, tensors
from qat_runner.quant.formats import Format
from qat_runner.quant.kernels.cost import Cost, Search
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
    if not format.signed:
        high = tensors.largest(x, False, dims)
        return _from_zero(high if pool is None else pool.largest(high))
    return tensors.extremes(x, dims, pool)


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


def octav(x: Tensor, format: Format, guess: Tensor | None, search: Search) -> Tensor:
    """OCTAV in two unknowns: the interval that minimizes

        J(low, high) = k (high - low)^2 #{low <= x <= high, x != 0} + sum (x - high)+^2 + sum (low - x)+^2

    with the indicators held constant, as the paper differentiates: k (high - low) # = sum (x - high)+ = sum (low - x)+.
    `kernels.intervals` says how that is solved. Where low is 0, what is left is OCTAV in one unknown.

    Args:
        x, format: as of `extremes`; x has elements, and a row more than one.
        guess: where to begin, [2, ...]; None: nowhere in particular.
        search: as of the kernels.
    """
    backend = kernels.backend(x)
    if format.signed:
        return backend.octav_interval(x, format.rounding_noise, guess, search)
    return _from_zero(backend.octav(x, Cost(format.rounding_noise, False), None if guess is None else guess[1], search))


def _from_zero(high: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(high), high])
