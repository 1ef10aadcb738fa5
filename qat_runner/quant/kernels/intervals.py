"""OCTAV in two unknowns, without the sums over the tensor: pure functions of a small state, one column per row of x.

With u = high, v = -low and W = u + v, the interval [low, high] solves (see `clipping_intervals.octav`)

    k W n = E+(u) = E-(v),      n = #{-v <= x <= u, x != 0},  E+ = sum (x - u)+,  E- = sum (-v - x)+

The logarithms of both sides of these equations are nearly linear in the tails, and exactly linear in exponential tails,
so Newton's method solves

    log(k W n) - log E+(u) = 0,   log(k W n) - log E-(v) = 0      with n held constant

in a few reads of x. On rows of few elements, E has kinks and n has jumps, and there may be no solution at all. Where
the last step was longer than `furthest`, or where clipping nothing has a smaller J, the answer is the interval with the
least J among all that were read.

The state is one float64 tensor [12, *shape of a bound], in units of the larger extreme's power of two.
"""

import math

import torch
from torch import Tensor

NEAR = 1 / 1024
"""The starting bound is at least this share of the extreme; from there, a step can at most double it."""
U, V = 0, 1
"""Rows of the state: the bounds u and v of the next read."""
BEST_U, BEST_V, LEAST, TOP_U, TOP_V, LO_U, LO_V, COUNT, MOVED, OVER_EXTREMES = range(2, 12)
"""Further rows of the state: the best interval that was read and its J, the extremes, the largest u and v known to
clip, #{x != 0}, the length of the last step relative to the width, and J of the last read over J at the extremes."""


def begin(u: Tensor, v: Tensor, top_u: Tensor, top_v: Tensor, k: float, count: Tensor) -> Tensor:
    """Return the state before the first read. J at the extremes is known without reading x there.

    Args:
        u, v: the bounds to start from; a bound that is not positive and finite starts at the extreme.
        top_u, top_v: the extremes, >= 0.
        k: the rounding noise, in units of W^2.
        count: #{x != 0}.
    """
    u, v, top_u, top_v, count = (t.double() for t in (u, v, top_u, top_v, count))
    u, v = (
        torch.where(torch.isfinite(s) & (s > 0), s.clamp(NEAR * top, top), top) for s, top in ((u, top_u), (v, top_v))
    )
    zero = torch.zeros_like(u)
    least = k * (top_u + top_v).square() * count
    return torch.stack([u, v, top_u, top_v, least, top_u, top_v, zero, zero, count, zero, zero])


def advance(state: Tensor, k: float, above: Tensor, below: Tensor) -> Tensor:
    """Return the next state, with the next u and v, from the sums of x at the state's u and v.

    Args:
        state: as returned by `begin` or by this function.
        k: the rounding noise, in units of W^2.
        above: sum of (x - u), number of elements, and sum of (x - u)^2, each over x > u: [3, *shape of a bound].
        below: the same for -x and v.
    """
    u, v, best_u, best_v, least, top_u, top_v, lo_u, lo_v, count, _, _ = state.unbind(0)
    excess_u, outside_u, square_u = above.double().unbind(0)
    excess_v, outside_v, square_v = below.double().unbind(0)
    width, inside = u + v, count - outside_u - outside_v
    cost = k * width.square() * inside + square_u + square_v
    better = cost < least
    best_u, best_v, least = (torch.where(better, *pair) for pair in ((u, best_u), (v, best_v), (cost, least)))
    lo_u = torch.where(excess_u > 0, torch.maximum(lo_u, u), lo_u)
    lo_v = torch.where(excess_v > 0, torch.maximum(lo_v, v), lo_v)

    level = (k * width * inside).clamp(min=torch.finfo(torch.float64).tiny).log()
    slope_u, slope_v = (_ratio(n, e) for n, e in ((outside_u, excess_u), (outside_v, excess_v)))
    off_u, off_v = (torch.where(e > 0, level - e.log(), 0.0) for e in (excess_u, excess_v))
    both = 1 / width.clamp(min=torch.finfo(torch.float64).tiny)
    clips_u, clips_v = excess_u > 0, excess_v > 0
    determinant = both * (slope_u + slope_v) + slope_u * slope_v
    joint = clips_u & clips_v
    joint_u = _ratio(both * off_v - off_u * (both + slope_v), determinant)
    joint_v = _ratio(both * off_u - off_v * (both + slope_u), determinant)
    step_u = torch.where(joint, joint_u, -_ratio(off_u, both + slope_u))
    step_v = torch.where(joint, joint_v, -_ratio(off_v, both + slope_v))
    next_u = torch.where(clips_u, _within(u + step_u, u, top_u), torch.where(lo_u > 0, (lo_u + u) / 2, 0.8 * u))
    next_v = torch.where(clips_v, _within(v + step_v, v, top_v), torch.where(lo_v > 0, (lo_v + v) / 2, 0.8 * v))
    moved = ((next_u - u).abs() + (next_v - v).abs()) * both
    over_extremes = _ratio(cost, k * (top_u + top_v).square() * count)
    return torch.stack([next_u, next_v, best_u, best_v, least, top_u, top_v, lo_u, lo_v, count, moved, over_extremes])


def furthest(k: float) -> float:
    """Return the longest last step, relative to the width, after which the next u and v are trusted without a read.

    It is a tenth of a step of the quantization grid. Longer steps lead to intervals with a larger J than those that
    were read, and on short rows even larger than that of clipping nothing.
    """
    return 0.1 * math.sqrt(12 * k)


def answer(state: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Return the final u and v, shape of a bound, in units of the state."""
    worse = (state[OVER_EXTREMES] > 1) | (state[MOVED] > furthest(k))
    return torch.where(worse, state[BEST_U], state[U]), torch.where(worse, state[BEST_V], state[V])


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)


def _within(proposed: Tensor, s: Tensor, top: Tensor) -> Tensor:
    """Limit a step: it may at most halve or double the bound, and the bound stays within the extreme."""
    return torch.minimum(torch.minimum(torch.maximum(proposed, s / 2), 2 * s), top)
