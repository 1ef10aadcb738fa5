"""OCTAV's iteration, without the sums over the tensor: pure functions of a small state, one column per row of x.

Solves g(s) = k s #{0<|x|<=s} - sum (|x| - s) 1{|x|>s} = 0, the condition of Theorem 3.1 (see `clipping.octav`). Each
read of x at some s shows on which side of the sign change of g this s lies. So an interval [lo, hi] that contains the
sign change shrinks from read to read, and the sums at its ends are used to propose the next s.

The state is one float64 tensor [11, *shape of s], so that a fused kernel can take and return it as a whole. Magnitudes
are in units of a power of two near their size, so scaling is exact and no sum overflows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

S, UNIT, MOVED, SUM_LO, NONZERO = 0, 1, 2, 6, 3
"""Rows of the state: s, the unit of all magnitudes, the last change of s, sum |x| above lo, and #{x != 0}."""


def solve(
    step: Callable[[Tensor], Tensor],
    guess: Tensor,
    k: float | Tensor,
    *,
    cold: bool,
    iterations: int,
    tolerance: float,
    look: bool,
) -> Tensor:
    """Iterate until the clipping scalars have converged.

    Args:
        step: state -> the next state, computed by `advance` from the sums of x; one read of x.
        guess: s_1, in units of x; the largest magnitude if `cold`. Where it is not positive and finite, 1 is used.
        k: the rounding noise, in units of s^2; a number, or one per row.
        cold: after one read at `guess`, start from the paper's s_1 = sum |x| / #{x != 0}.
        iterations: the largest number of reads after that.
        tolerance: with `look`, stop when no scalar moves by more than this, relatively.
        look: whether reading the state is free, as on a CPU; on other devices it would wait for the device.

    Returns:
        s, shape and dtype of `guess`.
    """
    state = begin(guess, k)
    if cold:
        state = step(state)
        mean = state[SUM_LO] / state[NONZERO].clamp(min=1)
        state = torch.cat([mean[None], state[1:]])
    for _ in range(iterations):
        state = step(state)
        if look and bool((state[MOVED] <= tolerance * state[S]).all()):
            break
    return (state[S] * state[UNIT]).to(guess.dtype)


def begin(guess: Tensor, k: float | Tensor) -> Tensor:
    """Return the state before the first read: [11, *guess.shape], float64."""
    guess = torch.where((guess > 0) & torch.isfinite(guess), guess, 1.0)
    unit = power_of_two(guess).double()
    zero = torch.zeros_like(unit)
    infinite = torch.full_like(unit, torch.inf)  # hi is not known yet
    noise = torch.full_like(unit, k) if isinstance(k, float) else k.to(unit.dtype).expand_as(unit)
    return torch.stack([guess.double() / unit, unit, infinite, zero, noise, zero, zero, zero, infinite, zero, zero])


def power_of_two(t: Tensor) -> Tensor:
    """Return the power of two at or below t > 0, float32 or float64; no subnormal, so that its inverse exists."""
    t = t.clamp(torch.finfo(t.dtype).tiny, torch.finfo(t.dtype).max / 4)
    if t.dtype == torch.float32:
        return (t.view(torch.int32) & 0x7F800000).view(torch.float32)
    return (t.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)


def advance(state: Tensor, excess: Tensor, outside: Tensor, total: Tensor, nonzero: Tensor, largest: Tensor) -> Tensor:
    """Narrow the interval by the sums of x at the state's s, and propose the next s.

    The next s is the first of these that applies:

    1. If the interval contains at most one element, or only equal ones, the published Newton steps from both of its
       ends give the answer: below the element, above it, or, where g jumps across zero, the element itself.
    2. Newton's method on log(k s #in) - log(excess), which is nearly linear in the tails, and exactly linear in
       exponential tails, if its step stays inside the interval and does not return to the opposite end.
    3. If all that is known is that s was too large, a little less than the largest magnitude.
    4. The mean of the elements inside the interval, which always divides them. But if the published Newton step from
       lo, which falls short in the tails, is below this mean, the point halfway between that step and hi.

    Args:
        state: as returned by `begin` or by this function.
        excess: sum of (a - s) over a > s, where a are magnitudes in units of the state; shape of s, like all below.
        outside: number of a > s.
        total: sum of a.
        nonzero: number of a > 0.
        largest: the largest a.
    """
    s, unit, _, _, k, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi = state.unbind(0)
    excess, outside, total, nonzero, largest = [t.double() for t in (excess, outside, total, nonzero, largest)]
    first = hi == torch.inf
    hi = torch.where(first, largest, hi)
    sum_lo, outside_lo = torch.where(first, total, sum_lo), torch.where(first, nonzero, outside_lo)

    above = excess + s * outside  # sum |x| 1{|x|>s}
    cost = k * s * (nonzero - outside)
    short = cost < excess  # g(s) < 0: the solution is above s
    lower = ~short & (s <= hi)
    lo, hi = torch.where(short, s, lo), torch.where(lower, s, hi)
    sum_lo, sum_hi = torch.where(short, above, sum_lo), torch.where(lower, above, sum_hi)
    outside_lo, outside_hi = torch.where(short, outside, outside_lo), torch.where(lower, outside, outside_hi)

    between = outside_lo - outside_hi  # elements in (lo, hi]
    mean = torch.where(between > 0, (sum_lo - sum_hi) / between, 0.0)
    newton_lo = sum_lo / torch.maximum(k * (nonzero - outside_lo) + outside_lo, k)
    newton_hi = sum_hi / torch.maximum(k * (nonzero - outside_hi) + outside_hi, k)
    exact = (between <= 1) | (mean >= hi * (1 - 1e-6))
    closed = torch.minimum(torch.minimum(newton_lo, torch.maximum(mean, newton_hi)), hi)
    log_newton = s - (cost.log() - excess.log()) / (1 / s + outside / excess)
    # A step back to the opposite end would cycle. The margin is there because x is read at s rounded to float32.
    returns = torch.where(short, log_newton >= hi * (1 - 2e-7), log_newton <= lo * (1 + 2e-7))
    fits = (lo < log_newton) & (log_newton < hi) & ~returns | (log_newton == s)
    divides = torch.where((lo < mean) & (mean < hi), mean, (lo + hi) / 2)  # because of rounding errors in the sums
    half_way = torch.where(newton_lo < divides, (newton_lo + hi) / 2, divides)
    proposal = torch.where((lo == 0) & (outside == 0), 0.8 * hi, half_way)
    proposal = torch.where(fits, log_newton, proposal)
    proposal = torch.where(exact, closed, proposal)
    return torch.stack(
        [proposal, unit, (proposal - s).abs(), nonzero, k, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi]
    )
