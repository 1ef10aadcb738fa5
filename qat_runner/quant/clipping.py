"""Clipping scalars: tensor -> s, by OCTAV (section 3 of the paper) and by its rivals (section 5).

All of them share one signature and one shape rule: `dim=None` gives one scalar for the whole tensor, shape []; `dim=d`
gives one for each index of dimension d, kept with the other dimensions at size 1, so [K, 1, 1, 1] for a convolution
weight with `dim=0`. They share these results as well:

- The dtype of s is float64 for float64 tensors and float32 for all others, whatever x is stored in.
- What is clipped are magnitudes: |x| on a signed grid, max(x, 0) on an unsigned one, which has no codes below zero.
- Rows that are all zero, and empty ones, give 0, which `fake_quantize` turns into zeros.
- Subnormal values and values near the largest float neither vanish nor overflow: rows are scaled to 1 first.
- NaN or infinity in x raises ValueError with `check=True`, which waits for the device. With `check=False`, meant for
  training steps, nothing waits and no s is promised: quantizing x with it leaves the NaN in the result.
- No gradient flows through s.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels import eager


def _prepare(x: Tensor, dim: int | None, check: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Validate x and dim; returns x, with at least one dimension, and the dimensions that one scalar spans."""
    if not x.is_floating_point():
        raise TypeError(f"a clipping scalar needs a floating tensor, not {x.dtype}")
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} does not exist in a tensor of shape {list(x.shape)}")
    if check and x.numel() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"x of shape {list(x.shape)} holds NaN or infinity: no clipping scalar exists")
    if dim is None:
        return x.detach().reshape(1) if x.ndim == 0 else x.detach(), tuple(range(max(x.ndim, 1)))
    return x.detach(), tuple([d for d in range(x.ndim) if d != dim % x.ndim])


def _largest(x: Tensor, signed: bool, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude of each row, dimensions kept, in the compute dtype; 0 for an empty row.

    The extremes of x are read where they lie: |x| would be a copy.
    """
    if not dims:  # each element is a row of its own, and amax(()) would reduce over everything
        return eager.magnitudes(x, signed)
    if math.prod([x.shape[d] for d in dims]) == 0:
        return x.new_zeros(_kept(x, dims), dtype=eager.compute_dtype(x))
    top = x.amax(dims, keepdim=True)
    top = torch.maximum(top, -x.amin(dims, keepdim=True)) if signed else top.clamp(min=0)
    return top.to(eager.compute_dtype(x))


@torch.no_grad()
def maximum(x: Tensor, bits: int, signed: bool = True, dim: int | None = None, *, check: bool = True) -> Tensor:
    """Max-scaling: s = max |x|, so nothing is clipped (up to the missing top code).

    Args:
        x: any shape and floating dtype.
        bits: unused by the value, checked all the same, so that the methods are exchangeable.
        signed: |x| if true, max(x, 0) otherwise.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        check: refuse NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head.
    """
    Grid(bits, signed)
    x, dims = _prepare(x, dim, check)
    s = _largest(x, signed, dims)
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def percentile(
    x: Tensor, bits: int, signed: bool = True, dim: int | None = None, q: float = 99.99, *, check: bool = True
) -> Tensor:
    """The q-th percentile of |x|, zeros included, linear between the two nearest elements (as NumPy's default).

    Args:
        x: any shape and floating dtype.
        bits: unused by the value, checked all the same, so that the methods are exchangeable.
        signed: |x| if true, max(x, 0) otherwise.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        q: 0 < q <= 100, in percent. The paper tries 99.9, 99.99 and 99.999.
        check: refuse NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head.

    Raises:
        ValueError: q outside (0, 100].
    """
    Grid(bits, signed)
    if not 0 < q <= 100:
        raise ValueError(f"q={q}: a percentile must lie in (0, 100]")
    x, dims = _prepare(x, dim, check)
    a = eager.magnitudes(x, signed)
    shape = [] if dim is None else _kept(a, dims)
    if a.numel() == 0:
        return a.new_zeros(shape)
    rows = a.reshape(1, -1) if dim is None else a.movedim(dim, 0).reshape(a.shape[dim], -1)
    n = rows.shape[1]
    position = (n - 1) * q / 100
    below = math.floor(position)
    # The order statistics wanted sit near the top: the few largest are found faster than a full sort would find them.
    top = rows.topk(n - below, dim=1, sorted=True).values
    s = torch.lerp(top[:, -1], top[:, max(n - below - 2, 0)], position - below)
    return s.reshape(shape)


@torch.no_grad()
def mse_sweep(
    x: Tensor,
    bits: int,
    signed: bool = True,
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
        bits: 2 to 16.
        signed: the grid.
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
    grid = Grid(bits, signed)
    if points < 1:
        raise ValueError(f"points={points}: a sweep needs at least 1")
    x, dims = _prepare(x, dim, check)
    unit = _largest(x, signed, dims)
    y = x.to(unit.dtype) / _positive(unit)
    if not signed:
        y.clamp_(min=0)  # costs the same for every candidate, and may not be in units of the row at all
    candidates = [k / points for k in range(1, points + 1)]
    errors = []
    for candidate in candidates:
        error = eager.fake_quantize(y, y.new_full((), candidate), grid).sub_(y).square_()
        errors.append(error.sum(dims, keepdim=True) if dims else error)
    cost = torch.stack(errors)  # [points, *shape of s]
    if dim is not None and together and cost.numel():
        weight = (unit / unit.amax().clamp(min=torch.finfo(unit.dtype).tiny)).square()  # back to units that rows share
        cost = (cost * weight).flatten(1).sum(1).reshape(-1, *[1] * unit.ndim)
    best = torch.tensor(candidates, dtype=unit.dtype, device=x.device)[cost.argmin(0)] if cost.numel() else unit
    s = best * unit
    return s.reshape(()) if dim is None else s


@torch.no_grad()
def newton_step(x: Tensor, s: Tensor | float, bits: int, signed: bool = True, dim: int | None = None) -> Tensor:
    """One Newton-Raphson step of OCTAV exactly as published (Corollary 3.2): the iteration of Figure 2.

        s_{n+1} = sum |x| 1{|x|>s_n} / ((4^-B / 3) #{0<|x|<=s_n} + #{|x|>s_n})      (12 instead of 3 when unsigned)

    Args:
        x: any shape and floating dtype.
        s: s_n in units of x; a number or a tensor of the result's shape.
        bits: 2 to 16.
        signed: the grid.
        dim: None for one scalar, or the dimension that gets one scalar an index.

    Returns:
        s_{n+1} in units of x, shape and dtype as in the module's head; 0 for all-zero rows.
    """
    grid = Grid(bits, signed)
    x, dims = _prepare(x, dim, check=False)
    a = (x.abs() if signed else x.clamp(min=0)).to(torch.float64)
    s = torch.as_tensor(s, dtype=torch.float64, device=x.device)
    clipped = a > s
    total = (a * clipped).sum(dims, keepdim=True)
    outside = clipped.sum(dims, keepdim=True)
    inside = ((a > 0) & ~clipped).sum(dims, keepdim=True)
    step = (total / (grid.rounding_noise * inside + outside)).nan_to_num(nan=0.0).to(eager.compute_dtype(x))
    return step.reshape(()) if dim is None else step


@torch.no_grad()
def octav(
    x: Tensor,
    bits: int,
    signed: bool = True,
    dim: int | None = None,
    iterations: int = 10,
    init: Tensor | float | None = None,
    *,
    tolerance: float = 1e-6,
    check: bool = True,
) -> Tensor:
    """OCTAV: the MSE-optimal clipping scalar of Theorem 3.1, solved to convergence.

    Solves the paper's condition J'(s) = 0 with the indicators held constant, as the paper differentiates:

        g(s) = k s #{0<|x|<=s} - sum (|x| - s) 1{|x|>s} = 0,      k = 4^-B / 3, or 4^-B / 12 when unsigned

    g rises with s, with a jump of k|x| at each element, so its sign change is unique: it is the minimum of the convex
    function sum k (s^2 - x^2)+ / 2 + (|x| - s)+^2 / 2. Where g jumps across zero, the answer is that element.

    The paper's Newton step alone (`newton_step`) approaches from below, needs more than ten steps at 8 bits, and on
    rows of few elements (depthwise filters, constants) falls into cycles. Here each read of x serves several
    proposals, and a bracket [lo, hi] of the sign change chooses among them (see `_Bracket`).

    Args:
        x: any shape and floating dtype.
        bits: 2 to 16.
        signed: the grid.
        dim: None for one scalar, or the dimension that gets one scalar an index.
        iterations: reads of x after the start, 1 or more. With 10, the paper's number, about one row in 10^5 of a
            heavy-tailed tensor is still off by more than 10^-4.
        init: s_1, in units of x: a number, or a tensor of the result's shape; from the scalars of a similar tensor,
            one or two iterations are enough. By default sum |x| / #{x != 0}, as in the paper. Where it is not positive
            and finite, 1 takes its place. The converged result does not depend on it.
        tolerance: on a CPU, where looking is free, reading ends when no scalar moves by more than this, relatively.
        check: refuse NaN and infinity (waits for the device).

    Returns:
        s in units of x; shape, dtype and special cases as in the module's head. A constant c and a single element c
        give |c|.

    Raises:
        ValueError: iterations below 1, NaN or infinity in x under `check`.
    """
    k = Grid(bits, signed).rounding_noise
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: OCTAV needs at least 1")
    x, dims = _prepare(x, dim, check)
    if not dims or x.numel() == 0:  # each element is a row of its own, or there is none
        return maximum(x, bits, signed, dim, check=False)
    if init is None:  # in units of the largest magnitude the answer is at most 1
        unit = _positive(_largest(x, signed, dims))
    else:  # in units of the guess it is about 1, and the largest magnitude need not be read
        guess = torch.as_tensor(init, dtype=eager.compute_dtype(x), device=x.device)
        unit = _positive(guess).expand(_kept(x, dims))
    read = kernels.backend().reader(x, unit, signed, dims)
    bracket: _Bracket | None = None
    s = torch.ones_like(unit, dtype=torch.float64)
    if init is None:
        _, _, total, nonzero, _ = read(s.to(unit.dtype))
        s = total.double() / nonzero.double().clamp(min=1)
    for _ in range(iterations):
        excess, outside, *others = [t.double() for t in read(s.to(unit.dtype))]
        bracket = bracket or _Bracket(k, *others)
        before, s = s, bracket.propose(s, excess, outside)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and _settled(s, before, tolerance):
            break
    s = (s * unit).to(unit.dtype)
    return s.reshape(()) if dim is None else s


def _settled(s: Tensor, before: Tensor, tolerance: float) -> bool:
    return bool(((s - before).abs() <= tolerance * s).all())


class _Bracket:
    """An interval [lo, hi] that holds the sign change of g, row by row, and what the next s should be.

    Args:
        k: rounding noise of the grid in units of s^2.
        total: sum of the magnitudes, any shape, float64.
        nonzero: how many of them are not zero.
        largest: the largest of them, which the answer does not exceed.
    """

    def __init__(self, k: float, total: Tensor, nonzero: Tensor, largest: Tensor) -> None:
        self.k, self.nonzero = k, nonzero
        self.lo, self.sum_lo, self.outside_lo = torch.zeros_like(total), total, nonzero
        self.hi, self.sum_hi, self.outside_hi = largest, torch.zeros_like(total), torch.zeros_like(total)

    def propose(self, s: Tensor, excess: Tensor, outside: Tensor) -> Tensor:
        """Narrow the bracket by the sums at s, and propose the next s. In the order in which they are preferred:

        1. If no element lies inside the bracket, the Newton step from lo is exact.
        2. Newton on log(k s #in) - log(excess), which is nearly linear in the tails, exact for exponential ones.
        3. If all that is known is that s was too large, a little less than the largest magnitude.
        4. Half-way between the paper's Newton step from lo, which falls short in the tails, and hi; with few elements
           left in the bracket their mean, which always divides them.

        Args:
            s: where the sums were taken.
            excess: sum of (|x| - s)+.
            outside: number of |x| > s.
        """
        k, inside = self.k, self.nonzero - outside
        above = excess + s * outside  # sum |x| 1{|x|>s}
        cost = k * s * inside
        short = cost < excess  # g(s) < 0: the answer lies above s
        lower = ~short & (s <= self.hi)
        self.lo, self.hi = torch.where(short, s, self.lo), torch.where(lower, s, self.hi)
        self.sum_lo, self.sum_hi = torch.where(short, above, self.sum_lo), torch.where(lower, above, self.sum_hi)
        self.outside_lo = torch.where(short, outside, self.outside_lo)
        self.outside_hi = torch.where(lower, outside, self.outside_hi)

        between = self.outside_lo - self.outside_hi  # elements in (lo, hi]
        mean = torch.minimum(torch.maximum((self.sum_lo - self.sum_hi) / between, self.lo), self.hi)
        newton = self.sum_lo / (k * (self.nonzero - self.outside_lo) + self.outside_lo).clamp(min=k)
        log_newton = s - (cost.log() - excess.log()) / (1 / s + outside / excess)
        half_way = torch.where((newton < self.hi) & (between > 2), (newton + self.hi) / 2, mean)
        proposal = torch.where((self.lo == 0) & (outside == 0), 0.8 * self.hi, half_way)
        fits = (self.lo < log_newton) & (log_newton < self.hi) | (log_newton == s)
        proposal = torch.where(fits, log_newton, proposal)
        exact = (between <= 0) | (mean >= self.hi * (1 - 1e-9))
        return torch.where(exact, torch.minimum(newton, self.hi), proposal)


def _kept(x: Tensor, dims: tuple[int, ...]) -> list[int]:
    """The shape of x with size 1 in dims."""
    return [1 if d in dims else n for d, n in enumerate(x.shape)]


def _positive(t: Tensor) -> Tensor:
    """t where it is positive and finite, else 1."""
    return torch.where((t > 0) & torch.isfinite(t), t, 1.0)


CLIPPING_METHODS: dict[str, Callable[..., Tensor]] = {
    "octav": octav,
    "max": maximum,
    "percentile": percentile,
    "mse_sweep": mse_sweep,
}
"""By name. Each takes (x, bits, signed, dim, *, check) and options of its own."""
