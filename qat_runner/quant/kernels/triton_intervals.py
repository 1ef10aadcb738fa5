"""OCTAV in two unknowns on the device: kernels of `triton` for formats with two clipping bounds.

The algorithm is that of `intervals`, where it is explained. The clipping bounds are float32 [2, rows], low and high;
within a kernel they are u = high and v = -low, in units of a power of two of the row.
"""

import triton
import triton.language as tl

from qat_runner.quant.kernels.triton_kernels import _meet, _parts, _power_of_two, _tile

NEAR = tl.constexpr(1 / 1024)
"""As `intervals.NEAR`."""
SUMS = tl.constexpr(8)
"""The number of sums of a read: excess and number above, excess and number below, squares of both; the smallest and the
largest element (zero included), and the number of nonzero elements, NaN if one is not finite."""


@triton.jit
def _beyond(x, scale, u, v):
    """Return how far x * scale lies above u, and whether it does, and the same below -v; all float32."""
    a = x * scale
    above, below = a > u, a < -v
    return tl.where(above, a - u, 0.0), above.to(tl.float32), tl.where(below, -v - a, 0.0), below.to(tl.float32)


@triton.jit
def _counted(x):
    """Return 1 for nonzero elements, 0 for zeros, and NaN for elements that are not finite."""
    return tl.where(tl.abs(x) < float("inf"), (x != 0).to(tl.float32), float("nan"))


@triton.jit
def _of_guess(guess_ptr, rows, row, mask):
    """Return the guess as a starting interval: u and v, float64, its unit, float32, and whether it is usable."""
    low = tl.load(guess_ptr + row, mask=mask, other=0.0)
    high = tl.load(guess_ptr + rows + row, mask=mask, other=0.0)
    reach = tl.maximum(-low, high)
    usable = (low <= 0) & (high >= 0) & (reach > 0) & (reach < float("inf"))
    unit = _power_of_two(tl.where(usable, reach, 1.0))
    u, v = tl.where(usable, high / unit, 0.0), tl.where(usable, -low / unit, 0.0)
    return u.to(tl.float64), v.to(tl.float64), unit, usable


@triton.jit
def _begin(u, v, top_u, top_v, k, count):
    """As `intervals.begin`: return u and v of the first read, and J at the extremes, float64."""
    u = tl.where((u > 0) & (u < top_u), tl.maximum(u, top_u * NEAR), top_u)
    v = tl.where((v > 0) & (v < top_v), tl.maximum(v, top_v * NEAR), top_v)
    return u, v, k * (top_u + top_v) * (top_u + top_v) * count


@triton.jit
def _within(proposed, s, top, lo, clips):
    """Limit a step as `intervals._within`; where nothing is clipped, propose a smaller bound."""
    trusted = tl.minimum(tl.minimum(tl.maximum(proposed, s / 2), 2 * s), top)
    return tl.where(clips, trusted, tl.where(lo > 0, (lo + s) / 2, 0.8 * s))


@triton.jit
def _off(level, excess, outside):
    """Return the difference of the logarithms at a bound, and outside / excess, the slope of -log(excess) there."""
    clips = excess > 0
    safe = tl.where(clips, excess, 1.0)
    return tl.where(clips, level - tl.log(safe), 0.0), tl.where(clips, outside / safe, 0.0)


@triton.jit
def _advance(
    moving, u, v, best_u, best_v, least, top_u, top_v, lo_u, lo_v, count, k,
    excess_u, outside_u, excess_v, outside_v, square, moved, worse,
):  # fmt: skip
    """As `intervals.advance`; all float64, one value per row. Rows that are no longer `moving` do not change.

    Returns u and v of the next read, the best interval so far and its J, the largest bounds that clip, the relative
    length of this step, and whether the interval that was read is worse than clipping nothing.
    """
    width, inside = u + v, count - outside_u - outside_v
    cost = k * width * width * inside + square
    better = moving & (cost < least)
    best_u, best_v, least = tl.where(better, u, best_u), tl.where(better, v, best_v), tl.where(better, cost, least)
    clips_u, clips_v = excess_u > 0, excess_v > 0
    lo_u = tl.where(moving & clips_u, tl.maximum(lo_u, u), lo_u)
    lo_v = tl.where(moving & clips_v, tl.maximum(lo_v, v), lo_v)

    level = tl.log(tl.maximum(k * width * inside, 2.2250738585072014e-308))
    both = 1 / tl.maximum(width, 2.2250738585072014e-308)
    off_u, slope_u = _off(level, excess_u, outside_u)
    off_v, slope_v = _off(level, excess_v, outside_v)
    joint = clips_u & clips_v
    determinant = tl.where(joint, both * (slope_u + slope_v) + slope_u * slope_v, 1.0)
    step_u = tl.where(joint, (both * off_v - off_u * (both + slope_v)) / determinant, -off_u / (both + slope_u))
    step_v = tl.where(joint, (both * off_u - off_v * (both + slope_u)) / determinant, -off_v / (both + slope_v))
    next_u, next_v = _within(u + step_u, u, top_u, lo_u, clips_u), _within(v + step_v, v, top_v, lo_v, clips_v)
    moved = tl.where(moving, (tl.abs(next_u - u) + tl.abs(next_v - v)) * both, moved)
    worse = tl.where(moving, (cost > k * (top_u + top_v) * (top_u + top_v) * count).to(tl.int32), worse)
    return tl.where(moving, next_u, u), tl.where(moving, next_v, v), best_u, best_v, least, lo_u, lo_v, moved, worse


@triton.jit
def _answer(u, v, best_u, best_v, moved, worse, furthest, unit, count):
    """Return low and high in units of x, float32; NaN where x has an element that is not finite."""
    solved = (worse == 0) & (moved <= furthest)
    low, high = -tl.where(solved, v, best_v) * unit, tl.where(solved, u, best_u) * unit
    finite = count >= 0
    return tl.where(finite, low, float("nan")).to(tl.float32), tl.where(finite, high, float("nan")).to(tl.float32)


@triton.jit
def intervals_of_rows(
    x_ptr,
    guess_ptr,
    ends_ptr,
    rows,
    n,
    k,
    furthest,
    tolerance,
    iterations,
    COLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve for rows x [rows, n], n <= BLOCK, in one read; guess (not read if COLD) and ends are float32 [2, rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present, column = row < rows, tl.arange(0, BLOCK)
    mask = present[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + row[:, None] * n + column[None, :], mask=mask, other=0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    count = tl.sum(_counted(x), 1).to(tl.float64)
    unit = _power_of_two(tl.maximum(-low, high))
    scale = (1.0 / unit)[:, None]
    top_u, top_v = (high / unit).to(tl.float64), (-low / unit).to(tl.float64)
    if COLD:
        over, above, under, below = _beyond(x, scale, 0.0, 0.0)
        u = 2 * tl.sum(over, 1).to(tl.float64) / tl.maximum(tl.sum(above, 1), 1.0)
        v = 2 * tl.sum(under, 1).to(tl.float64) / tl.maximum(tl.sum(below, 1), 1.0)
    else:
        u, v, its, _ = _of_guess(guess_ptr, rows, row, present)
        u, v = u * (its / unit), v * (its / unit)
    u, v, least = _begin(u, v, top_u, top_v, k, count)
    best_u, best_v = top_u, top_v
    lo_u, lo_v, moved, worse = u * 0, u * 0, u * 0, tl.zeros([ROWS], dtype=tl.int32)
    i = 0
    moving = present
    while (i < iterations) & (tl.max(moving.to(tl.int32), 0) > 0):
        u, v = u.to(tl.float32), v.to(tl.float32)
        over, above, under, below = _beyond(x, scale, u[:, None], v[:, None])
        u, v, best_u, best_v, least, lo_u, lo_v, moved, worse = _advance(
            moving,
            u.to(tl.float64),
            v.to(tl.float64),
            best_u,
            best_v,
            least,
            top_u,
            top_v,
            lo_u,
            lo_v,
            count,
            k,
            tl.sum(over, 1).to(tl.float64),
            tl.sum(above, 1).to(tl.float64),
            tl.sum(under, 1).to(tl.float64),
            tl.sum(below, 1).to(tl.float64),
            tl.sum(over * over + under * under, 1).to(tl.float64),
            moved,
            worse,
        )
        moving = moving & (moved > tolerance)  # each row stops as soon as it has converged
        i += 1
    low, high = _answer(u, v, best_u, best_v, moved, worse, furthest, unit, count)
    tl.store(ends_ptr + row, low, mask=present)
    tl.store(ends_ptr + rows + row, high, mask=present)


@triton.jit
def _read(
    x_ptr, to_ptr, scale, u, v, n, part, programs, FIRST: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr
):
    """Store a program's share of a row's sums at u and v in [SUMS, programs], float32; the last three if FIRST."""
    excess_u = tl.zeros([LANES], dtype=tl.float32)
    outside_u = tl.zeros([LANES], dtype=tl.float32)
    excess_v = tl.zeros([LANES], dtype=tl.float32)
    outside_v = tl.zeros([LANES], dtype=tl.float32)
    square = tl.zeros([LANES], dtype=tl.float32)
    low = tl.zeros([LANES], dtype=tl.float32)
    high = tl.zeros([LANES], dtype=tl.float32)
    count = tl.zeros([LANES], dtype=tl.float32)
    first = part.to(tl.int64) * (UNROLL * LANES)
    while first < n:
        offsets = _tile(first, UNROLL, LANES)
        x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
        over, above, under, below = _beyond(x, scale, u, v)
        excess_u += tl.sum(over, 0)
        outside_u += tl.sum(above, 0)
        excess_v += tl.sum(under, 0)
        outside_v += tl.sum(below, 0)
        square += tl.sum(over * over + under * under, 0)
        if FIRST:
            low = tl.minimum(low, tl.min(x, 0))
            high = tl.maximum(high, tl.max(x, 0))
            count += tl.sum(_counted(x), 0)
        first += programs * (UNROLL * LANES)
    tl.store(to_ptr + part, tl.sum(excess_u))
    tl.store(to_ptr + programs + part, tl.sum(outside_u))
    tl.store(to_ptr + 2 * programs + part, tl.sum(excess_v))
    tl.store(to_ptr + 3 * programs + part, tl.sum(outside_v))
    tl.store(to_ptr + 4 * programs + part, tl.sum(square))
    if FIRST:
        tl.store(to_ptr + 5 * programs + part, tl.min(low))
        tl.store(to_ptr + 6 * programs + part, tl.max(high))
        tl.store(to_ptr + 7 * programs + part, tl.sum(count))


@triton.jit
def _sums(parts_ptr, programs, PROGRAMS: tl.constexpr):
    """Return the first five sums of a read, over all programs, float64."""
    return (
        tl.sum(_parts(parts_ptr, 0, programs, PROGRAMS)),
        tl.sum(_parts(parts_ptr, 1, programs, PROGRAMS)),
        tl.sum(_parts(parts_ptr, 2, programs, PROGRAMS)),
        tl.sum(_parts(parts_ptr, 3, programs, PROGRAMS)),
        tl.sum(_parts(parts_ptr, 4, programs, PROGRAMS)),
    )


@triton.jit
def intervals_of_long(
    x_ptr,
    guess_ptr,
    ends_ptr,
    parts_ptr,
    arrived_ptr,
    rows,
    n,
    programs,
    groups,
    k,
    furthest,
    tolerance,
    iterations,
    COLD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    POLLS: tl.constexpr,
):
    """As `intervals_of_rows` for rows of any size, with reads shared as in `triton_kernels.solve_long`.

    parts: float32 [groups, 2, SUMS, programs]. The guess is used unless it is too close to zero to say anything about
    x, which the first read shows.
    """
    group, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    parts_ptr += group * (2 * SUMS * programs)
    arrived_ptr += group
    row = group.to(tl.int64)
    together, turn = group >= 0, 0  # have all programs reached each barrier; barriers so far
    while row < rows:
        x = x_ptr + row * n
        u, v, unit, near = _of_guess(guess_ptr, rows, row, row >= 0 if not COLD else row < 0)
        here_ptr = parts_ptr + (turn % 2) * (SUMS * programs)
        here_u, here_v = u.to(tl.float32), v.to(tl.float32)
        _read(x, here_ptr, 1.0 / unit, here_u, here_v, n, part, programs, True, UNROLL, LANES)
        turn += 1
        together = together & _meet(arrived_ptr, turn * programs, POLLS)
        excess_u, outside_u, excess_v, outside_v, square = _sums(here_ptr, programs, PROGRAMS)
        low = tl.min(_parts(here_ptr, 5, programs, PROGRAMS))
        high = tl.max(_parts(here_ptr, 6, programs, PROGRAMS))
        count = tl.sum(_parts(here_ptr, 7, programs, PROGRAMS))
        near = near & (square < float("inf")) & (u >= high * NEAR / unit) & (v >= -low * NEAR / unit)
        if not near:
            unit = _power_of_two(tl.maximum(-low, high).to(tl.float32))
            at_ptr = parts_ptr + (turn % 2) * (SUMS * programs)
            _read(x, at_ptr, 1.0 / unit, 0.0, 0.0, n, part, programs, False, UNROLL, LANES)
            turn += 1
            together = together & _meet(arrived_ptr, turn * programs, POLLS)
            excess_u, outside_u, excess_v, outside_v, square = _sums(at_ptr, programs, PROGRAMS)
            u, v = 2 * excess_u / tl.maximum(outside_u, 1.0), 2 * excess_v / tl.maximum(outside_v, 1.0)
        top_u, top_v = high / unit, -low / unit
        u, v, least = _begin(u, v, top_u, top_v, k, count)
        best_u, best_v = top_u, top_v
        lo_u, lo_v, moved, worse = u * 0, u * 0, u * 0, 0
        i = 0
        moving = together
        while moving:
            here_u, here_v = u.to(tl.float32), v.to(tl.float32)
            if (i > 0) | (not near):
                at_ptr = parts_ptr + (turn % 2) * (SUMS * programs)
                _read(x, at_ptr, 1.0 / unit, here_u, here_v, n, part, programs, False, UNROLL, LANES)
                turn += 1
                together = together & _meet(arrived_ptr, turn * programs, POLLS)
                excess_u, outside_u, excess_v, outside_v, square = _sums(at_ptr, programs, PROGRAMS)
            u, v, best_u, best_v, least, lo_u, lo_v, moved, worse = _advance(
                moving,
                here_u.to(tl.float64),
                here_v.to(tl.float64),
                best_u,
                best_v,
                least,
                top_u,
                top_v,
                lo_u,
                lo_v,
                count,
                k,
                excess_u,
                outside_u,
                excess_v,
                outside_v,
                square,
                moved,
                worse,
            )
            i += 1
            moving = together & (moved > tolerance) & (i < iterations)
        low_end, high_end = _answer(u, v, best_u, best_v, moved, worse, furthest, unit, count)
        if part == 0:
            tl.store(ends_ptr + row, tl.where(together, low_end, float("nan")))
            tl.store(ends_ptr + rows + row, tl.where(together, high_end, float("nan")))
        row += groups
