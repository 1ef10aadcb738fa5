"""Clipping scalars: tensor -> s, by OCTAV (section 3 of the paper) and by its rivals (section 5).

All of them share one signature and one shape rule: `dim=None` gives one scalar for the whole tensor, shape []; `dim=d`
gives one for each index of dimension d, kept with the other dimensions at size 1, so [K, 1, 1, 1] for a convolution
weight with `dim=0`. They share these results as well:

- The dtype of s is float64 for float64 tensors and float32 for all others, whatever x is stored in.
- What is clipped are magnitudes: |x| in a signed format, max(x, 0) in an unsigned one, which has no values below zero.
- Rows that are all zero, and empty ones, give 0, which `fake_quantize` turns into zeros.
- Subnormal values and values near the largest float neither vanish nor overflow: rows are scaled to 1 first.
- NaN or infinity in x raises ValueError with `check=True`, which waits for the device. With `check=False`, meant for
  training steps, nothing waits; quantizing x with s leaves NaN in the result: the NaN that was there, or, where an
  infinite magnitude is, NaN all over the row.
- No gradient flows through s.
- In an oriented format s is a magnitude: `orienting.oriented` finds its sign.
- For a format with two ends the result is low and high, stacked along a first dimension: [2], or [2, K, 1, 1, 1].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qat_runner.quant import kernels, two_ends
from qat_runner.quant.formats import Format, IntFormat, as_format
from qat_runner.quant.kernels.cost import Search, cost_of
from qat_runner.quant.limits import TOLERANCE, check_iterations, check_percentile, check_points, check_refine
from qat_runner.quant.orienting import side_of_largest
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, kept, largest, magnitudes, recording

FEW = 4096
"""Elements that share a scalar, at most, where `octav` refines it."""


def _prepare(x: Tensor, dim: int | None, check: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Validate x and dim; returns x, with at least one dimension, and the dimensions that one scalar spans."""
    if not x.is_floating_point():
        raise TypeError(f"a clipping scalar needs a floating tensor, not {x.dtype}")
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} does not exist in a tensor of shape {list(x.shape)}")
    if check and not _all_finite(x):
        raise ValueError(f"x of shape {list(x.shape)} holds NaN or infinity: no clipping scalar exists")
    if dim is None:
        return x.detach().reshape(1) if x.ndim == 0 else x.detach(), tuple(range(max(x.ndim, 1)))
    return x.detach(), tuple([d for d in range(x.ndim) if d != dim % x.ndim])


def _all_finite(x: Tensor) -> bool:
    # A sum is one read and allocates nothing; NaN and infinity get into it, but it may also overflow.
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


@torch.no_grad()
def maximum(
    x: Tensor,
    format: Format | int,
    dim: int | None = None,
    *,
    check: bool = True,
    pool: Pool | None = None,
) -> Tensor:
    """Max-scaling: s = max |x|, so nothing is clipped (up to the missing top code).

    Args:
        x: any shape and floating dtype.
        format: of which the sign alone counts; a number stands for the signed integers of so many bits.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        check: refuse NaN and infinity (waits for the device).
        pool: what x is a part of; None: it is all there is.

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head.
    """
    format = as_format(format)
    x, dims = _prepare(x, dim, check)
    if format.parts == 2:
        return _in_shape(two_ends.extremes(x, format, dims, pool), dim)
    s = largest(x, format.signed, dims)
    s = s if pool is None else pool.largest(s)
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def mean_magnitude(x: Tensor, format: Format | int, dim: int | None = None, *, check: bool = True) -> Tensor:
    """The mean of the magnitudes, zeros included; shape, dtype and special cases as in the module's head."""
    x, dims = _prepare(x, dim, check)
    a = magnitudes(x, as_format(format).signed)
    count = math.prod([x.shape[d] for d in dims])
    s = (a / max(count, 1)).sum(dims, keepdim=True) if dims else a
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def percentile(
    x: Tensor, format: Format | int, dim: int | None = None, q: float = 99.99, *, check: bool = True
) -> Tensor:
    """The q-th percentile of |x|, zeros included, linear between the two nearest elements (as NumPy's default).

    Args:
        x: any shape and floating dtype.
        format: of which the sign alone counts; a number stands for the signed integers of so many bits.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        q: 0 < q <= 100, in percent. The paper tries 99.9, 99.99 and 99.999.
        check: refuse NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head.

    Raises:
        ValueError: q outside (0, 100].
    """
    format = as_format(format)
    check_percentile(q)
    if q == 100:
        return maximum(x, format, dim, check=check)  # needs no copy
    x, dims = _prepare(x, dim, check)
    if format.parts == 2:
        return _in_shape(two_ends.percentiles(x, format, dims, lambda rows: _percentile_of_rows(rows, q)), dim)
    a = magnitudes(x, format.signed)
    shape = [] if dim is None else kept(a, dims)
    if a.numel() == 0:
        return a.new_zeros(shape)
    rows = a.reshape(1, -1) if dim is None else a.movedim(dim, 0).reshape(a.shape[dim], -1)
    return _percentile_of_rows(rows, q).reshape(shape)


def _percentile_of_rows(rows: Tensor, q: float) -> Tensor:
    """Of each of [rows, n], NaN if it is not finite; leaves them in disorder."""
    position = (rows.shape[1] - 1) * q / 100
    below, above = math.floor(position), math.ceil(position)
    low, high, largest = _order_statistics(rows, below, above)
    return torch.where(torch.isfinite(largest), torch.lerp(low, high, position - below), torch.nan)


def _in_shape(ends: Tensor, dim: int | None) -> Tensor:
    """Ends with all dimensions of x kept, in the shape of a result: [2] for one interval."""
    return ends.reshape(2) if dim is None else ends


def _order_statistics(rows: Tensor, below: int, above: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of [rows, n], the elements of ranks below and above, counted from 0 upwards, and the largest.

    NaN is larger than any. Leaves rows in disorder.
    """
    if rows.device.type == "cpu" and not recording():
        rows.numpy().partition(below, axis=1)  # several ranks at once would be ten times slower than one
        return rows[:, below], rows[:, above:].amin(1), rows[:, below:].amax(1)
    # Nothing waits for the device. Percentiles that clip sit near the top, which is found faster than all are sorted.
    n = rows.shape[1]
    top = rows.topk(n - below, dim=1, sorted=True).values
    return top[:, -1], top[:, n - 1 - above], top[:, 0]


AT_ONCE = 10
"""Candidates of a sweep that a compiled graph tries together: a graph of each alone takes a minute to compile."""


def _errors(y: Tensor, format: Format, candidates: Sequence[float], dims: tuple[int, ...]) -> Tensor:
    """The squared error of y at each of some scalars, [candidates, *shape of s]; the better sign's if there are two."""
    signs = (1, -1) if format.oriented else (1,)
    together = torch.compiler.is_compiling()
    spanned, errors = tuple(d + together for d in dims), []
    for first in range(0, len(candidates), AT_ONCE if together else 1):
        some = candidates[first : first + AT_ONCE]
        s = y.new_tensor(some).reshape(-1, *[1] * y.ndim) if together else y.new_full((), some[0])
        tried = [format.fake_quantize(y, sign * s).sub_(y).square_() for sign in signs]
        errors.append(torch.stack([e.sum(spanned, keepdim=True) if dims else e for e in tried]).amin(0))
    return torch.cat(errors) if together else torch.stack(errors)


@torch.no_grad()
def mse_sweep(
    x: Tensor,
    format: Format | int,
    dim: int | None = None,
    points: int = 100,
    *,
    together: bool = True,
    check: bool = True,
) -> Tensor:
    """The best of `points` candidates k/points * max |x|, k = 1..points, by the measured MSE of the quantizer itself.

    Source: section 5 ("MSE"). Ties go to the smallest candidate.

    Args:
        x: any shape and floating dtype.
        format: what is rounded to; a number stands for the signed integers of so many bits.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        points: how many candidates, at least 1.
        together: with `dim`, rows share one k, the least total MSE deciding, as in the paper; false lets each row
            choose its own.
        check: refuse NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head.

    Raises:
        ValueError: points below 1.
    """
    format = as_format(format)
    check_points(points)
    x, dims = _prepare(x, dim, check)
    if format.parts == 2:
        return _in_shape(two_ends.mse_sweep(x, format, dims, points, together), dim)
    unit = largest(x, format.signed, dims)
    y = x.to(unit.dtype) / torch.where(unit > 0, unit, 1.0)
    if not format.signed:
        y.clamp_(min=0)  # costs the same for every candidate, and may not be in units of the row at all
    candidates = [k / points for k in range(1, points + 1)]
    cost = _errors(y, format, candidates, dims)
    if dim is not None and together and cost.numel():
        weight = (unit / unit.amax().clamp(min=torch.finfo(unit.dtype).tiny)).square()  # back to units that rows share
        cost = (cost * weight).flatten(1).sum(1).reshape(-1, *[1] * unit.ndim)
    # No table of candidates, which would have to be sent to the device.
    best = ((cost.argmin(0) + 1).double() / points).to(unit.dtype) if cost.numel() else unit
    s = best * unit
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def newton_step(x: Tensor, s: Tensor | float, format: Format | int, dim: int | None = None) -> Tensor:
    """One Newton-Raphson step of OCTAV exactly as published (Corollary 3.2): the iteration of Figure 2.

        s_{n+1} = sum |x| 1{|x|>s_n} / ((4^-B / 3) #{0<|x|<=s_n} + #{|x|>s_n})      (12 instead of 3 when unsigned)

    Args:
        x: any shape and floating dtype.
        s: s_n in units of x; a number or a tensor of the result's shape.
        format: what is rounded to; a number stands for the signed integers of so many bits.
        dim: None for one scalar, or the dimension that gets one scalar an index.

    Returns:
        s_{n+1} in units of x, shape and dtype as in the module's head; 0 for all-zero rows.
    """
    format = as_format(format)
    x, dims = _prepare(x, dim, check=False)
    a = (x.abs() if format.signed else x.clamp(min=0)).to(torch.float64)
    s = torch.as_tensor(s, dtype=torch.float64, device=x.device)
    clipped = a > s
    total = (a * clipped).sum(dims, keepdim=True)
    outside = clipped.sum(dims, keepdim=True)
    inside = ((a > 0) & ~clipped).sum(dims, keepdim=True)
    step = (total / (format.rounding_noise * inside + outside)).nan_to_num(nan=0.0).to(compute_dtype(x))
    return step.reshape(()) if dim is None else step


@torch.no_grad()
def octav(
    x: Tensor,
    format: Format | int,
    dim: int | None = None,
    iterations: int = 10,
    init: Tensor | float | None = None,
    *,
    tolerance: float = TOLERANCE,
    check: bool = True,
    pool: Pool | None = None,
    missing_code: bool = False,
    orientation: Tensor | None = None,
    refine: int = 0,
) -> Tensor:
    """OCTAV: the MSE-optimal clipping scalar of Theorem 3.1, solved to convergence.

    Solves the paper's condition J'(s) = 0 with the indicators held constant, as the paper differentiates:

        g(s) = k s #{0<|x|<=s} - sum (|x| - s) 1{|x|>s} = 0,      k = 4^-B / 3, or 4^-B / 12 when unsigned

    g rises with s, with a jump of k|x| at each element, so its sign change is unique: it is the minimum of the convex
    function sum k (s^2 - x^2)+ / 2 + (|x| - s)+^2 / 2. Where g jumps across zero, the answer is that element.

    The paper neglects that two's complement has no code at +s. What is clipped there lands on the last code, at
    t = s (1 - 2^(1-B)), and so costs (x - t)^2. With that end counted where it lies,

        J(s) = k s^2 #{in between} + sum (x - t)^2 1{x>t} + sum (|x| - s)^2 1{x<-s}

    which is solved in the same way (see `kernels.cost`); in an oriented format on the side without a code at s, always.

    The paper's Newton step alone (`newton_step`) approaches from below, needs more than ten steps at 8 bits, and on
    rows of few elements (depthwise filters, constants) falls into cycles. Here each read of x serves several
    proposals, and a bracket [lo, hi] of the sign change chooses among them (see `kernels.newton`).

    Args:
        x: any shape and floating dtype.
        format: what is rounded to; a number stands for the signed integers of so many bits.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        iterations: reads of x after the start, 1 or more. With 10, the paper's number, about one row in 10^5 of a
            heavy-tailed tensor is still off by more than 10^-4.
        init: s_1, in units of x: a number, or a tensor of the result's shape; from the scalars of a similar tensor,
            one or two iterations are enough. By default sum |x| / #{x != 0}, as in the paper. Where it is not positive
            and finite, 1 takes its place. The converged result does not depend on it, if it is no further from the
            elements of x than float32 reaches, a factor of 10^18.
        tolerance: on a CPU, where looking is free, reading ends when no scalar moves by more than this, relatively.
        check: refuse NaN and infinity (waits for the device).
        pool: what x is a part of, one may be empty, all with the same `init`; None: it is all there is. The
            result is the scalar of all parts together.
        missing_code: count the last code of two's complement where it lies, and not at s.
        orientation: in an oriented format, numbers with the signs of s, shape of the result, as far as they are known;
            None: those that serve the largest magnitudes.
        refine: J(s) spreads the noise of rounding evenly, which holds for many elements. Where one scalar spans few, at
            most `FEW`, so many candidates are tried, half of them from a third to three times of it and half around the
            best of these, and the one with the least measured error is taken (plain integers only); 0: none.

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head. A constant c and a single element c
        give |c|, unless an end is missing on that side.

    Raises:
        ValueError: iterations below 1, `refine` below 0 or of a pool, NaN or infinity in x under `check`.
    """
    format = as_format(format)
    check_iterations(iterations)
    check_refine(refine)
    if refine and pool is not None:
        raise ValueError(f"refine={refine}: measures errors of one part alone, not of a pool")
    x, dims = _prepare(x, dim, check)
    orientation = None if orientation is None else orientation.reshape(kept(x, dims))
    if not dims or (x.numel() == 0 and pool is None):  # each element is a row of its own, or there is none
        return maximum(x, format, dim, check=False, pool=pool)
    search = Search(dims, iterations, tolerance, pool)
    guess = None if init is None else torch.as_tensor(init, dtype=compute_dtype(x), device=x.device)
    if format.parts == 2:
        guess = None if guess is None else guess.reshape(2, *kept(x, dims))
        return _in_shape(two_ends.octav(x, format, guess, search), dim)
    guess = None if guess is None else guess.expand(kept(x, dims))
    free = orientation is None
    if format.oriented and free:
        orientation = side_of_largest(x, dims, pool)
    s = kernels.backend(x).octav(x, cost_of(format, missing_code, orientation), guess, search)
    if refine and isinstance(format, IntFormat) and x.numel() <= FEW * s.numel():
        pointed = s if orientation is None or not format.oriented else torch.copysign(s, orientation)
        s = _refined(x, pointed, format, refine, both_signs=format.oriented and free)
    return s.reshape(()) if dim is None else s


def _refined(x: Tensor, s: Tensor, format: IntFormat, candidates: int, both_signs: bool) -> Tensor:
    """The best of some scalars by measured error: half of them far and wide around s, the others around the best."""
    widely = [1.0, *_spread(1.5, (candidates + 1) // 2)]
    if both_signs:
        widely += [-factor for factor in widely]
    backend = kernels.backend(x)
    s = backend.refine(x, s, format, widely)
    return backend.refine(x, s, format, [1.0, *_spread(0.2, candidates // 2)]).abs()


def _spread(octaves: float, count: int) -> list[float]:
    """So many factors up to some octaves around 1."""
    return torch.logspace(-octaves, octaves, count, 2, dtype=torch.float64, device="cpu").tolist()
