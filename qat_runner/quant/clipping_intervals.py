"""Clipping intervals of formats with two bounds, low <= 0 <= high: the counterpart of `clipping` for one scalar.

Results are stacked, [2, *shape of a scalar], with the dtype rule of `clipping`. For unsigned formats, low is 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat_runner.quant import kernels, tensors
from qat_runner.quant.formats import Format
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.newton import power_of_two
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, scalar_shape


def extremes(x: Tensor, format: Format, dims: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """Return the minimum and the maximum of zero and the elements of each row.

    Args:
        x: at least one dimension, any floating dtype.
        format: a format with two bounds.
        dims: the dimensions that one interval spans, kept with size 1; if empty, each element is a row.
        pool: the parts, of which x is one, that share intervals; None if x is the whole tensor.
    """
    if not format.signed:
        high = tensors.largest(x, False, dims)
        return _from_zero(high if pool is None else pool.largest(high))
    return tensors.extremes(x, dims, pool)


def percentiles(x: Tensor, format: Format, dims: tuple[int, ...], rank: Callable[[Tensor], Tensor]) -> Tensor:
    """Return intervals whose upper bound is the q-th percentile of x, and whose lower one is minus that of -x.

    Bounds on the wrong side of zero are replaced by 0.

    Args:
        x, format, dims: see `extremes`.
        rank: a function that returns the q-th percentile of each row of [rows, n], in shape [rows]; it may reorder the
            elements of its argument.
    """
    shape = scalar_shape(x, dims)
    if x.numel() == 0:
        return x.new_zeros((2, *shape), dtype=compute_dtype(x))
    spanned = [d for d in range(x.ndim) if d not in dims]
    rows = x.permute(*spanned, *dims).reshape(math.prod(shape), -1).to(compute_dtype(x))
    high = rank(rows.clone()).clamp(min=0)
    low = -rank(-rows).clamp(min=0) if format.signed else torch.zeros_like(high)
    return torch.stack([low, high]).reshape(2, *shape)


def mse_sweep(x: Tensor, format: Format, dims: tuple[int, ...], points: int, together: bool) -> Tensor:
    """Return the best of `points` intervals, in three sweeps over fractions k/points of the extremes.

    The first sweep scales both extremes by the same fraction, the second the lower one alone, the third the upper one
    alone. The second and third keep the previous result unless a candidate is better.

    Args:
        x, format, dims: see `extremes`.
        points: number of candidates in each sweep.
        together: all rows share the fractions with the least total squared error; if false, each row has its own.
    """
    top = extremes(x, format, dims)
    if x.numel() == 0:
        return top
    unit = power_of_two(torch.maximum(-top[0], top[1]))  # else squares of small and of large values vanish or overflow
    wide, top = x.to(compute_dtype(x)) / unit, top / unit
    weight = (unit / unit.amax()).square()  # back to units shared by rows
    ends = top
    for sides in ((0, 1), (0,), (1,)):
        candidates = [_shared(ends, top, sides, k / points) for k in range(1, points + 1)]
        cost = torch.stack([_squared_error(wide, format, c, dims) for c in [ends, *candidates]])
        if together:
            cost = (cost * weight).flatten(1).sum(1).reshape(-1, *[1] * x.ndim).expand(cost.shape)
        best = cost.argmin(0, keepdim=True)
        ends = torch.stack([torch.stack([c[i] for c in [ends, *candidates]]).gather(0, best)[0] for i in (0, 1)])
    return ends * unit


def _squared_error(x: Tensor, format: Format, ends: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the squared error of each row, summed at once: a hundred candidates must not hold a copy of x each."""
    error = (format.fake_quantize(x, ends) - x).square_()
    return error.sum(dims, keepdim=True) if dims else error


def _shared(ends: Tensor, top: Tensor, sides: Sequence[int], share: float) -> Tensor:
    return torch.stack([top[i] * share if i in sides else ends[i] for i in (0, 1)])


def octav(x: Tensor, format: Format, guess: Tensor | None, search: Search) -> Tensor:
    """OCTAV in two unknowns: return the interval that minimizes

        J(low, high) = k (high - low)^2 #{low <= x <= high, x != 0} + sum (x - high)+^2 + sum (low - x)+^2

    The derivative treats the indicators as constant, as in the paper: k (high - low) # = sum (x - high)+ =
    sum (low - x)+. `kernels.intervals` describes how this is solved. In unsigned formats low is 0, which leaves OCTAV
    in one unknown.

    Args:
        x, format: see `extremes`; only a part of a pool may be empty.
        guess: initial interval, [2, ...]; None for the default start.
        search: see `kernels.cost.Search`; its `dims` must not be empty.
    """
    backend = kernels.backend(x)
    if format.signed:
        return backend.octav_interval(x, format.rounding_noise, guess, search)
    return _from_zero(backend.octav(x, Cost(format.rounding_noise, False), None if guess is None else guess[1], search))


def _from_zero(high: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(high), high])
