"""Find the clipping scalar s of a tensor, by OCTAV (section 3 of the paper) or by its competitors (section 5).

All functions share one signature and one shape rule: `dim=None` gives one scalar for the whole tensor, in shape [];
`dim=d` gives one scalar for each index of dimension d, with all other dimensions kept at size 1, so [K, 1, 1, 1] for a
convolution weight with `dim=0`. The elements that share a scalar are called a row. These rules hold for all functions:

- The dtype of s is float64 for float64 tensors and float32 for all others, whatever x is stored in.
- Clipping applies to magnitudes: |x| in a signed format, max(x, 0) in an unsigned one, which has no values below zero.
- s is 0 for empty rows and for rows that are all zero. `fake_quantize` with s = 0 returns zeros.
- Subnormal values and values near the largest float neither vanish nor overflow: rows are scaled to 1 first. With two
  clipping bounds, their distance must be below the largest float.
- With `check=True`, NaN or infinity in x raises ValueError; this check waits for the device. With `check=False`, meant
  for training steps, nothing waits for the device. Quantizing x with such an s returns NaN at least where x is NaN, and
  in the whole row where a magnitude is infinite.
- No gradient flows through s.
- In an oriented format s is a magnitude; `orienting.oriented` finds its sign.
- For a format with two clipping bounds, the result is low and high, stacked along a first dimension: [2], or
  [2, K, 1, 1, 1]. (`mean_magnitude` has one value per row for every format, and `newton_step` rejects such formats.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qat_runner.quant import clipping_intervals, kernels
from qat_runner.quant.formats import Format, IntFormat, as_format
from qat_runner.quant.kernels.cost import Search, cost_of
from qat_runner.quant.kernels.newton import power_of_two
from qat_runner.quant.limits import TOLERANCE, check_iterations, check_percentile, check_points, check_refine
from qat_runner.quant.orienting import side_of_largest
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, largest, magnitudes, recording, scalar_shape

FEW = 4096
"""`octav` refines a scalar only if at most this many elements share it."""


def _prepare(x: Tensor, dim: int | None, check: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Validate x and dim; return x, with at least one dimension, and the dimensions that one scalar spans."""
    if not x.is_floating_point():
        raise TypeError(f"a clipping scalar needs a floating-point tensor, not {x.dtype}")
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} does not exist in a tensor of shape {list(x.shape)}")
    if check and not _all_finite(x):
        raise ValueError(f"x of shape {list(x.shape)} holds NaN or infinity, so it has no clipping scalar")
    if dim is None:
        return x.detach().reshape(1) if x.ndim == 0 else x.detach(), tuple(range(max(x.ndim, 1)))
    return x.detach(), tuple([d for d in range(x.ndim) if d != dim % x.ndim])


def _all_finite(x: Tensor) -> bool:
    # A sum reads x once and allocates nothing. NaN and infinity carry over to it, but a finite x may also overflow.
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
        format: number format, of which only the sign matters; a number B means signed B-bit integers.
        dim: None for one scalar, or the dimension that gets one scalar per index.
        check: raise ValueError on NaN and infinity (waits for the device).
        pool: the tensors on all processes that share s; None if x is the whole tensor.

    Returns:
        s in units of x; shape, dtype and special cases as in the module docstring.
    """
    format = as_format(format)
    x, dims = _prepare(x, dim, check)
    if format.parts == 2:
        return _in_shape(clipping_intervals.extremes(x, format, dims, pool), dim)
    s = largest(x, format.signed, dims)
    s = s if pool is None else pool.largest(s)
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def mean_magnitude(x: Tensor, format: Format | int, dim: int | None = None, *, check: bool = True) -> Tensor:
    """Mean of the magnitudes, zeros included; shape, dtype and special cases as in the module docstring."""
    x, dims = _prepare(x, dim, check)
    a = magnitudes(x, as_format(format).signed)
    count = math.prod([x.shape[d] for d in dims])
    s = (a / max(count, 1)).sum(dims, keepdim=True) if dims else a
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def percentile(
    x: Tensor, format: Format | int, dim: int | None = None, q: float = 99.99, *, check: bool = True
) -> Tensor:
    """The q-th percentile of |x|, zeros included, interpolated linearly between elements (NumPy's default).

    Args:
        x: any shape and floating dtype.
        format: number format, of which only the sign matters; a number B means signed B-bit integers.
        dim: None for one scalar, or the dimension that gets one scalar per index.
        q: 0 < q <= 100, in percent. The paper tries 99.9, 99.99 and 99.999.
        check: raise ValueError on NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module docstring.

    Raises:
        ValueError: if q is outside (0, 100].
    """
    format = as_format(format)
    check_percentile(q)
    if q == 100:
        return maximum(x, format, dim, check=check)  # needs no copy
    x, dims = _prepare(x, dim, check)
    if format.parts == 2:
        return _in_shape(
            clipping_intervals.percentiles(x, format, dims, lambda rows: _percentile_of_rows(rows, q)), dim
        )
    a = magnitudes(x, format.signed)
    shape = [] if dim is None else scalar_shape(a, dims)
    if a.numel() == 0:
        return a.new_zeros(shape)
    rows = a.reshape(1, -1) if dim is None else a.movedim(dim, 0).reshape(a.shape[dim], -1)
    return _percentile_of_rows(rows, q).reshape(shape)


def _percentile_of_rows(rows: Tensor, q: float) -> Tensor:
    """Return the q-th percentile of each row of [rows, n], NaN for rows that are not finite; reorders the rows."""
    position = (rows.shape[1] - 1) * q / 100
    below, above = math.floor(position), math.ceil(position)
    low, high, largest = _order_statistics(rows, below, above)
    return torch.where(torch.isfinite(largest), torch.lerp(low, high, position - below), torch.nan)


def _in_shape(ends: Tensor, dim: int | None) -> Tensor:
    """Reshape clipping bounds with all dimensions of x to the shape of a result: [2] for one interval."""
    return ends.reshape(2) if dim is None else ends


def _order_statistics(rows: Tensor, below: int, above: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the elements of ranks `below` and `above` and the largest element of each row of [rows, n].

    Ranks count from 0 in ascending order. NaN ranks above all numbers. Reorders the rows.
    """
    if rows.device.type == "cpu" and not recording():
        rows.numpy().partition(below, axis=1)  # partitioning at several ranks would be ten times slower
        return rows[:, below], rows[:, above:].amin(1), rows[:, below:].amax(1)
    # This must not wait for the device. Percentiles for clipping are near the top, and topk is faster than a full sort.
    n = rows.shape[1]
    top = rows.topk(n - below, dim=1, sorted=True).values
    return top[:, -1], top[:, n - 1 - above], top[:, 0]


AT_ONCE = 10
"""Candidates that a compiled graph tries together: a graph that tries each one alone would take a minute to compile."""


def _errors(y: Tensor, format: Format, candidates: Sequence[float], dims: tuple[int, ...]) -> Tensor:
    """Return the squared errors of y by candidate, [candidates, *shape of s]; for the better sign if s has a sign."""
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

    Source: section 5 ("MSE"). On ties, the smallest candidate is chosen.

    Args:
        x: any shape and floating dtype.
        format: number format to round to; a number B means signed B-bit integers.
        dim: None for one scalar, or the dimension that gets one scalar per index.
        points: number of candidates, at least 1.
        together: with `dim`, all rows share the k with the least total MSE, as in the paper; if false, each row has its
            own k.
        check: raise ValueError on NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module docstring.

    Raises:
        ValueError: if points is below 1.
    """
    format = as_format(format)
    check_points(points)
    x, dims = _prepare(x, dim, check)
    if format.parts == 2:
        return _in_shape(clipping_intervals.mse_sweep(x, format, dims, points, together), dim)
    unit = largest(x, format.signed, dims)
    y = x.to(unit.dtype) / torch.where(unit > 0, unit, 1.0)
    if not format.signed:
        y.clamp_(min=0)  # negative values add the same error to every candidate, and `unit` does not bound them
    candidates = [k / points for k in range(1, points + 1)]
    cost = _errors(y, format, candidates, dims)
    if dim is not None and together and cost.numel():
        weight = (unit / unit.amax().clamp(min=torch.finfo(unit.dtype).tiny)).square()  # back to units shared by rows
        cost = (cost * weight).flatten(1).sum(1).reshape(-1, *[1] * unit.ndim)
    # Computed, since a table of candidates would have to be copied to the device.
    best = ((cost.argmin(0) + 1).double() / points).to(unit.dtype) if cost.numel() else unit
    s = best * unit
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def newton_step(x: Tensor, s: Tensor | float, format: Format | int, dim: int | None = None) -> Tensor:
    """One Newton-Raphson step of OCTAV exactly as published (Corollary 3.2): the iteration of Figure 2.

        s_{n+1} = sum |x| 1{|x|>s_n} / ((4^-B / 3) #{0<|x|<=s_n} + #{|x|>s_n})      (12 instead of 3 when unsigned)

    Args:
        x: any shape and floating dtype.
        s: s_n in units of x; a number or a tensor in the shape of the result.
        format: number format to round to; a number B means signed B-bit integers.
        dim: None for one scalar, or the dimension that gets one scalar per index.

    Returns:
        s_{n+1} in units of x, shape and dtype as in the module docstring; 0 for all-zero rows.

    Raises:
        ValueError: the format has two clipping bounds.
    """
    format = as_format(format)
    if format.parts != 1:
        raise ValueError(f"newton_step: applies to formats with one clipping scalar, not to {format.name}")
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

    Solves the paper's condition J'(s) = 0. As in the paper, the derivative treats the indicators as constant:

        g(s) = k s #{0<|x|<=s} - sum (|x| - s) 1{|x|>s} = 0,      k = 4^-B / 3, or 4^-B / 12 when unsigned

    g increases with s and jumps by k|x| at each element, so its sign change is unique. It is the minimum of the convex
    function sum k (s^2 - x^2)+ / 2 + (|x| - s)+^2 / 2. If g jumps across zero at an element, the solution is the
    magnitude of that element.

    The paper neglects that two's complement has no code at +s. Values clipped on that side are mapped to the last code,
    at t = s (1 - 2^(1-B)), which costs (x - t)^2. If this is taken into account,

        J(s) = k s^2 #{in between} + sum (x - t)^2 1{x>t} + sum (|x| - s)^2 1{x<-s}

    and it is solved in the same way (see `kernels.cost`). In an oriented format, the side without a code at s is always
    treated like this.

    The paper's Newton step alone (`newton_step`) approaches the solution from below, needs more than ten steps at 8
    bits, and runs into cycles on rows of few elements (depthwise filters, constants). Here, each read of x provides
    several proposals for the next s, and a bracket [lo, hi] of the sign change selects one (see `kernels.newton`).

    Args:
        x: any shape and floating dtype.
        format: number format to round to; a number B means signed B-bit integers.
        dim: None for one scalar, or the dimension that gets one scalar per index.
        iterations: number of reads of x after the start, 1 or more. With 10, the paper's number, about one row in 10^5
            of a heavy-tailed tensor is still off by more than 10^-4.
        init: s_1, in units of x: a number or a tensor in the shape of the result. With the scalars of a similar tensor,
            one or two iterations are enough. By default sum |x| / #{x != 0}, as in the paper. Where it is not positive
            and finite, 1 is used instead. The converged result does not depend on it, as long as it is within the range
            of float32 from the elements of x, a factor of 10^18.
        tolerance: on a CPU, where checking for convergence costs nothing, iterations stop when no scalar changes by
            more than this, relatively.
        check: raise ValueError on NaN and infinity (waits for the device).
        pool: the parts, of which x is one, that share the scalar; all have the same `init`, and a part may be empty.
            None if x is the whole tensor.
        missing_code: account for the last code of two's complement, which lies below +s.
        orientation: in an oriented format, numbers with the signs of s, as far as known, in the shape of the result.
            With None, the signs are those that suit the largest magnitudes.
        refine: number of candidates that are tried around the solution, 0 for none (plain integers only). J(s) assumes
            evenly distributed rounding noise, which holds for many elements. If at most `FEW` elements share a scalar,
            half of the candidates lie between a third and three times the solution, the other half around the best of
            these, and the one with the least measured error is returned.

    Returns:
        s in units of x; shape, dtype and special cases as in the module docstring. The result for a constant c or a
        single element c is |c|, unless a missing code at s on that side is taken into account.

    Raises:
        ValueError: if iterations is below 1, `refine` is below 0 or used with a pool, or x contains NaN or infinity and
            `check` is true.
    """
    format = as_format(format)
    check_iterations(iterations)
    check_refine(refine)
    if refine and pool is not None:
        raise ValueError(f"refine={refine}: must be 0 with a pool, since errors are measured on one part only")
    x, dims = _prepare(x, dim, check)
    orientation = None if orientation is None else orientation.reshape(scalar_shape(x, dims))
    if not dims or (x.numel() == 0 and pool is None):  # each element is a row by itself, or there are no elements
        return maximum(x, format, dim, check=False, pool=pool)
    search = Search(dims, iterations, tolerance, pool)
    guess = None if init is None else torch.as_tensor(init, dtype=compute_dtype(x), device=x.device)
    if format.parts == 2:
        guess = None if guess is None else guess.reshape(2, *scalar_shape(x, dims))
        return _in_shape(clipping_intervals.octav(x, format, guess, search), dim)
    guess = None if guess is None else guess.expand(scalar_shape(x, dims))
    free = orientation is None
    if format.oriented and free:
        orientation = side_of_largest(x, dims, pool)
    s = kernels.backend(x).octav(x, cost_of(format, missing_code, orientation), guess, search)
    if refine and isinstance(format, IntFormat) and x.numel() <= FEW * s.numel():
        pointed = s if orientation is None or not format.oriented else torch.copysign(s, orientation)
        s = _refined(x, pointed, format, refine, both_signs=format.oriented and free)
    return s.reshape(()) if dim is None else s


def _refined(x: Tensor, s: Tensor, format: IntFormat, candidates: int, both_signs: bool) -> Tensor:
    """Return the scalar with the least measured error: first among candidates far around s, then around the best."""
    widely = [1.0, *_spread(1.5, (candidates + 1) // 2)]
    if both_signs:
        widely += [-factor for factor in widely]
    backend, unit = kernels.backend(x), power_of_two(s.abs())
    x, s = x.to(s.dtype) / unit, s / unit
    s = backend.refine(x, s, format, widely)
    return backend.refine(x, s, format, [1.0, *_spread(0.2, candidates // 2)]).abs() * unit


def _spread(octaves: float, count: int) -> list[float]:
    """Return `count` factors from 2^-octaves to 2^octaves, evenly spaced on a logarithmic scale."""
    return torch.logspace(-octaves, octaves, count, 2, dtype=torch.float64, device="cpu").tolist()
