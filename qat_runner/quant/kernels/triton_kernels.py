"""The device code: the kernels that `triton` launches.

Tensors are dense [rows, n]. Each program processes tiles: [ROWS, BLOCK], whole rows, for short rows; [UNROLL, LANES], a
contiguous part of one row, for long rows, with all loads in flight before the first one is waited for. Offsets are
int64. Sums are float32 within the lanes of a tile, and are combined in a fixed order from there on; the few scalars
that describe a row are float64.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits for a fraction, so halves go to even
SUMS = tl.constexpr(6)
"""The number of sums of a read: excess, outside, total, nonzero, largest, count."""
FIELDS = tl.constexpr(8)
"""The number of fields of a tensor in TABLE, int64 [tensors, FIELDS]: the addresses of x and of s, running and batches
of its state; the number of rows, and of elements per row; the offsets of its scalars and elements in the outputs."""


@triton.jit
def _power_of_two(t):
    """Return the power of two at or below t; float32 -> float32; 1 where t is not positive and finite."""
    t = tl.where((t > 0) & (t < float("inf")), t, 1.0)
    t = tl.minimum(tl.maximum(t, 1.1754943508222875e-38), 8.507059173023462e37)
    return (t.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _start(guess):
    """Return s in units of the guess's power of two, float64, and this unit, float32, from the guess, float32."""
    unit = _power_of_two(guess)
    guess = tl.where((guess > 0) & (guess < float("inf")), guess, 1.0)
    return (guess / unit).to(tl.float64), unit


@triton.jit
def _magnitude(x, short, reach, SIGNED: tl.constexpr, SIDED: tl.constexpr, POINTED: tl.constexpr):
    """Return the magnitudes of x and their weights (`cost.sided`)."""
    if SIDED:
        if POINTED:
            x = tl.where(short < 0, -x, x)
        return tl.where(x < 0, -x * reach, x), tl.where(x < 0, 1.0 / (reach * reach), 1.0)
    return tl.abs(x) if SIGNED else tl.where(x < 0, 0.0, x), tl.where(x < 0, 1.0, 1.0)


@triton.jit
def _propose(s, k, nonzero, excess, outside, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi):
    """As `newton.advance`; all float64, one value per row. Returns the next s and the interval."""
    above = excess + s * outside
    cost = k * s * (nonzero - outside)
    short = cost < excess
    lower = ~short & (s <= hi)
    lo, hi = tl.where(short, s, lo), tl.where(lower, s, hi)
    sum_lo, sum_hi = tl.where(short, above, sum_lo), tl.where(lower, above, sum_hi)
    outside_lo, outside_hi = tl.where(short, outside, outside_lo), tl.where(lower, outside, outside_hi)

    between = outside_lo - outside_hi
    mean = tl.where(between > 0, (sum_lo - sum_hi) / tl.maximum(between, 1.0), 0.0)
    newton_lo = sum_lo / tl.maximum(k * (nonzero - outside_lo) + outside_lo, k)
    newton_hi = sum_hi / tl.maximum(k * (nonzero - outside_hi) + outside_hi, k)
    exact = (between <= 1) | (mean >= hi * (1 - 1e-6))
    closed = tl.minimum(tl.minimum(newton_lo, tl.maximum(mean, newton_hi)), hi)
    # Where either is zero, the logarithms are not used, but must not be infinite.
    usable = (cost > 0) & (excess > 0)
    safe_cost, safe_excess, safe_s = tl.where(usable, cost, 1.0), tl.where(usable, excess, 1.0), tl.where(s > 0, s, 1.0)
    log_newton = s - (tl.log(safe_cost) - tl.log(safe_excess)) / (1 / safe_s + outside / safe_excess)
    returns = tl.where(short, log_newton >= hi * (1 - 2e-7), log_newton <= lo * (1 + 2e-7))
    fits = usable & (((lo < log_newton) & (log_newton < hi) & ~returns) | (log_newton == s))
    divides = tl.where((lo < mean) & (mean < hi), mean, (lo + hi) / 2)  # because of rounding errors in the sums
    half_way = tl.where(newton_lo < divides, (newton_lo + hi) / 2, divides)
    proposal = tl.where((lo == 0) & (outside == 0), 0.8 * hi, half_way)
    proposal = tl.where(fits, log_newton, proposal)
    proposal = tl.where(exact, closed, proposal)
    return proposal, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi


@triton.jit
def _answer(s, unit, reach, total):
    """Return s in units of x, float32; NaN where x has an element that is not finite."""
    s = tl.div_rn((s * unit).to(tl.float32), reach)
    return tl.where(total < float("inf"), s, float("nan"))


@triton.jit
def _steps(x, s, resolution):
    """As `IntFormat.in_steps`; x float32 -> float32; s is the full scale."""
    return tl.div_rn(x, tl.where(s == 0, 1.0, s)) * resolution


@triton.jit
def _code(steps, lowest, highest):
    """Return the nearest code, clamped to the lowest and the highest."""
    code = tl.where(steps < lowest, lowest, steps)  # NaN stays NaN
    code = tl.where(code > highest, highest, code)
    return (code + ROUND) - ROUND


@triton.jit
def _round(x, s, resolution, lowest, highest):
    """As `Format.fake_quantize`; x float32 -> float32; s is the full scale."""
    return _code(_steps(x, s, resolution), lowest, highest) * (1.0 / resolution) * s


@triton.jit
def _between(low, high, steps):
    """Return the step size of two clipping bounds, and the lowest and the highest code minus the zero point."""
    step = tl.div_rn(high - low, steps)
    zero = tl.div_rn(-low, tl.where(step == 0, 1.0, step))
    zero = (tl.minimum(tl.maximum(zero, 0.0), steps) + ROUND) - ROUND
    return step, -zero, steps - zero


@triton.jit
def _full_scale(s, levels, resolution):
    """As `IntFormat.full_scale`."""
    return tl.where(levels == resolution, s, tl.div_rn(s, levels) * resolution)


@triton.jit
def _take_over(s, last_ptr, running_ptr, momentum, mask):
    """As `remembered.remember`, except for the count of batches."""
    last, running = tl.load(last_ptr, mask=mask, other=0.0), tl.load(running_ptr, mask=mask, other=0.0)
    s = tl.where(tl.abs(s) < float("inf"), s, last)
    # As torch.lerp, which gives s itself at momentum 1.
    near = running + momentum * (s - running)
    average = tl.where(momentum < 0.5, near, s - (s - running) * (1.0 - momentum))
    tl.store(last_ptr, s, mask=mask)
    tl.store(running_ptr, average, mask=mask)


@triton.jit
def remember(s_ptr, last_ptr, running_ptr, batches_ptr, rows, momentum, BLOCK: tl.constexpr):
    """Update the state; s, last, running float32 [rows], batches int64 []; BLOCK scalars per program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows
    _take_over(tl.load(s_ptr + at, mask=mask, other=0.0), last_ptr + at, running_ptr + at, momentum, mask)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def _solve_held(
    x,
    row,
    present,
    guess_ptr,
    short_ptr,
    k,
    reach,
    tolerance,
    iterations,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    COLD: tl.constexpr,
):
    """Return the scalars, float32 [ROWS], of rows x, float32 [ROWS, BLOCK], padded with zeros."""
    short = tl.load(short_ptr + row, mask=present & POINTED, other=0.0)
    raw, weight = _magnitude(x, short[:, None], reach, SIGNED, SIDED, POINTED)
    top = tl.max(raw, 1)
    guess = top if COLD else tl.load(guess_ptr + row, mask=present, other=1.0) * reach
    s, unit = _start(guess)
    a = raw * (1.0 / unit)[:, None]
    k = s * 0 + k  # float64
    nonzero = tl.sum(tl.where(raw > 0, weight, 0.0), 1).to(tl.float64)
    if SIDED:
        count = tl.sum((raw > 0).to(tl.float32), 1).to(tl.float64)
        k = tl.where(nonzero > 0, k * (count / tl.maximum(nonzero, 1.0)), k)
    total = tl.sum(weight * a, 1).to(tl.float64)
    hi = tl.max(a, 1).to(tl.float64)
    lo, sum_lo, outside_lo, sum_hi, outside_hi = s * 0, total, nonzero, s * 0, s * 0
    if COLD:
        s = total / tl.maximum(nonzero, 1.0)
    i = 0
    moving = present
    while (i < iterations) & (tl.max(moving.to(tl.int32), 0) > 0):
        here = s.to(tl.float32)
        beyond = a > here[:, None]
        excess = tl.sum(tl.where(beyond, weight * (a - here[:, None]), 0.0), 1).to(tl.float64)
        outside = tl.sum(tl.where(beyond, weight, 0.0), 1).to(tl.float64)
        before = here.to(tl.float64)
        proposal, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi = _propose(
            before, k, nonzero, excess, outside, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi
        )
        s = tl.where(moving, proposal, s)  # each row stops as soon as it has converged
        moving = moving & (tl.abs(s - before) > tolerance * s)
        i += 1
    return _answer(s, unit, reach, total)


@triton.jit
def solve_rows(
    x_ptr,
    guess_ptr,
    short_ptr,
    s_ptr,
    running_ptr,
    batches_ptr,
    out_ptr,
    rows,
    n,
    k,
    reach,
    tolerance,
    iterations,
    momentum,
    levels,
    resolution,
    lowest,
    highest,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    COLD: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve for rows x [rows, n], n <= BLOCK, in one read; guess (not read if COLD), short and s are float32 [rows].

    With STEP, also remember s in guess, running and batches, and write x rounded to out.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present, column = row < rows, tl.arange(0, BLOCK)
    at = row[:, None] * n + column[None, :]
    mask = present[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    found = _solve_held(
        x, row, present, guess_ptr, short_ptr, k, reach, tolerance, iterations, SIGNED, SIDED, POINTED, COLD
    )
    tl.store(s_ptr + row, found, mask=present)
    if STEP:
        _take_over(found, guess_ptr + row, running_ptr + row, momentum, present)
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
        full = _full_scale(found, levels, resolution)
        tl.store(out_ptr + at, _round(x, full[:, None], resolution, lowest, highest), mask=mask)


@triton.jit
def _entry(table_ptr, tensor, FIELD: tl.constexpr):
    """Return one field of a tensor in TABLE, a number or an address."""
    return tl.load(table_ptr + tensor * FIELDS + FIELD)


@triton.jit
def solve_rows_of_many(
    table_ptr,
    tiles_ptr,
    s_ptr,
    out_ptr,
    k,
    reach,
    tolerance,
    iterations,
    momentum,
    levels,
    resolution,
    lowest,
    highest,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    COLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `solve_rows` with STEP for the rows of several tensors, each of which is described in TABLE.

    tiles: int64 [programs, 2], each program's tensor and first row. s, out: of all tensors, one after another.
    """
    tensor = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    rows, n = _entry(table_ptr, tensor, 4), _entry(table_ptr, tensor, 5)
    x_ptr = _entry(table_ptr, tensor, 0).to(out_ptr.dtype)
    last_ptr = _entry(table_ptr, tensor, 1).to(s_ptr.dtype)
    running_ptr = _entry(table_ptr, tensor, 2).to(s_ptr.dtype)
    s_ptr += _entry(table_ptr, tensor, 6)
    out_ptr += _entry(table_ptr, tensor, 7)
    row = first + tl.arange(0, ROWS)
    present, column = row < rows, tl.arange(0, BLOCK)
    at = row[:, None] * n + column[None, :]
    mask = present[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    found = _solve_held(x, row, present, last_ptr, s_ptr, k, reach, tolerance, iterations, SIGNED, SIDED, False, COLD)
    tl.store(s_ptr + row, found, mask=present)
    _take_over(found, last_ptr + row, running_ptr + row, momentum, present)
    if first == 0:
        batches_ptr = _entry(table_ptr, tensor, 3).to(tl.pointer_type(tl.int64))
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    full = _full_scale(found, levels, resolution)
    tl.store(out_ptr + at, _round(x, full[:, None], resolution, lowest, highest), mask=mask)


@triton.jit
def _tile(first, UNROLL: tl.constexpr, LANES: tl.constexpr):
    """Return the offsets of a tile in its row, int64 [UNROLL, LANES]; the vectors of one thread are LANES apart."""
    return first + (tl.arange(0, UNROLL) * LANES)[:, None] + tl.arange(0, LANES)[None, :]


@triton.jit
def _largest(
    x_ptr,
    short,
    reach,
    n,
    part,
    programs,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return the largest magnitude in a program's share of a row."""
    largest = tl.zeros([LANES], dtype=tl.float32)
    first = part.to(tl.int64) * (UNROLL * LANES)
    while first < n:  # not a range: some interpreters need a constant bound
        offsets = _tile(first, UNROLL, LANES)
        x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
        raw, _ = _magnitude(x, short, reach, SIGNED, SIDED, POINTED)
        largest = tl.maximum(largest, tl.max(raw, 0))
        first += programs * (UNROLL * LANES)
    return tl.max(largest)


@triton.jit
def _read(
    x_ptr,
    to_ptr,
    short,
    s,
    scale,
    reach,
    n,
    part,
    programs,
    FIRST: tl.constexpr,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store a program's share of a row's sums at s in [SUMS, programs]: all if FIRST, else the two that need s."""
    excess = tl.zeros([LANES], dtype=tl.float32)
    outside = tl.zeros([LANES], dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)
    nonzero = tl.zeros([LANES], dtype=tl.float32)
    largest = tl.zeros([LANES], dtype=tl.float32)
    count = tl.zeros([LANES], dtype=tl.float32)
    first = part.to(tl.int64) * (UNROLL * LANES)
    while first < n:
        offsets = _tile(first, UNROLL, LANES)
        x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
        raw, weight = _magnitude(x, short, reach, SIGNED, SIDED, POINTED)
        a = raw * scale
        excess += tl.sum(tl.where(a > s, weight * (a - s), 0.0), 0)
        outside += tl.sum(tl.where(a > s, weight, 0.0), 0)
        if FIRST:
            total += tl.sum(weight * a, 0)
            nonzero += tl.sum(tl.where(raw > 0, weight, 0.0), 0)
            largest = tl.maximum(largest, tl.max(a, 0))
            count += tl.sum((raw > 0).to(tl.float32), 0)
        first += programs * (UNROLL * LANES)
    tl.store(to_ptr + part, tl.sum(excess))
    tl.store(to_ptr + programs + part, tl.sum(outside))
    if FIRST:
        tl.store(to_ptr + 2 * programs + part, tl.sum(total))
        tl.store(to_ptr + 3 * programs + part, tl.sum(nonzero))
        tl.store(to_ptr + 4 * programs + part, tl.max(largest))
        tl.store(to_ptr + 5 * programs + part, tl.sum(count))


@triton.jit
def _parts(parts_ptr, sum, programs, PROGRAMS: tl.constexpr):
    """Load one sum of all programs of a row, float64 [PROGRAMS]; volatile, so that no stale cache is read."""
    index = tl.arange(0, PROGRAMS)
    part = tl.load(parts_ptr + sum * programs + index, mask=index < programs, other=0.0, volatile=True)
    return part.to(tl.float64)


@triton.jit
def _meet(arrived_ptr, expected, POLLS: tl.constexpr):
    """Barrier: wait for the expected arrivals; false after POLLS polls. Earlier writes of all programs are visible."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") + 1
    polls = 0
    while (arrived < expected) & (polls < POLLS):
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acq_rel", scope="gpu")
        polls += 1
    tl.debug_barrier()
    return arrived >= expected


@triton.jit
def solve_long(
    x_ptr,
    guess_ptr,
    short_ptr,
    s_ptr,
    running_ptr,
    batches_ptr,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    rows,
    n,
    programs,
    groups,
    k,
    reach,
    tolerance,
    iterations,
    momentum,
    levels,
    resolution,
    lowest,
    highest,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    COLD: tl.constexpr,
    STEP: tl.constexpr,
    MANY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    POLLS: tl.constexpr,
):
    """As `solve_rows` for rows of any size, each of which is read by `programs` programs, at most PROGRAMS.

    The programs of a row synchronize after each read, and each computes the same next state from the sums of all. There
    are `groups` groups of such programs, all on the device at once; each group processes every groups-th row. parts:
    float32 [groups, 2, SUMS, programs], two buffers in turn, so that what is read after one barrier is not overwritten
    before the next one. arrived: int32 [groups], zeros.

    With MANY, x is TABLE, in which each entry describes one row; the entry of a tensor's first row has the address of
    batches, the others have zero.
    """
    group, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    parts_ptr += group * (2 * SUMS * programs)
    arrived_ptr += group
    row = group.to(tl.int64)
    together, turn = group >= 0, 0  # have all programs reached each barrier; barriers so far
    while row < rows:
        if MANY:
            x = _entry(x_ptr, row, 0).to(out_ptr.dtype)
            last_ptr = _entry(x_ptr, row, 1).to(s_ptr.dtype)
            average_ptr = _entry(x_ptr, row, 2).to(s_ptr.dtype)
            count = _entry(x_ptr, row, 3)
            count_ptr, counts = count.to(tl.pointer_type(tl.int64)), count != 0
            size = _entry(x_ptr, row, 5)
            answer_ptr, to_ptr = s_ptr + _entry(x_ptr, row, 6), out_ptr + _entry(x_ptr, row, 7)
        else:
            x, last_ptr, average_ptr, count_ptr = x_ptr + row * n, guess_ptr + row, running_ptr + row, batches_ptr
            counts = row == 0
            size, answer_ptr, to_ptr = n, s_ptr + row, out_ptr + row * n
        short = tl.load(short_ptr + row) if POINTED else 0.0
        if COLD:
            here_ptr = parts_ptr + (turn % 2) * (SUMS * programs)
            share = _largest(x, short, reach, size, part, programs, SIGNED, SIDED, POINTED, UNROLL, LANES)
            tl.store(here_ptr + part, share)
            turn += 1
            together = together & _meet(arrived_ptr, turn * programs, POLLS)
            guess = tl.max(_parts(here_ptr, 0, programs, PROGRAMS)).to(tl.float32)
        else:
            guess = tl.load(last_ptr) * reach
        s, unit = _start(guess)
        scale, here = 1.0 / unit, s.to(tl.float32)
        here_ptr = parts_ptr + (turn % 2) * (SUMS * programs)
        _read(x, here_ptr, short, here, scale, reach, size, part, programs, True, SIGNED, SIDED, POINTED, UNROLL, LANES)
        turn += 1
        together = together & _meet(arrived_ptr, turn * programs, POLLS)
        excess = tl.sum(_parts(here_ptr, 0, programs, PROGRAMS))
        outside = tl.sum(_parts(here_ptr, 1, programs, PROGRAMS))
        total = tl.sum(_parts(here_ptr, 2, programs, PROGRAMS))
        nonzero = tl.sum(_parts(here_ptr, 3, programs, PROGRAMS))
        hi = tl.max(_parts(here_ptr, 4, programs, PROGRAMS))
        ks = s * 0 + k  # float64
        if SIDED:
            count = tl.sum(_parts(here_ptr, 5, programs, PROGRAMS))
            ks = tl.where(nonzero > 0, ks * (count / tl.maximum(nonzero, 1.0)), ks)
        lo, sum_lo, outside_lo, sum_hi, outside_hi = s * 0, total, nonzero, s * 0, s * 0
        if COLD:  # this read, at the largest magnitude, only shows that it is too large
            s = total / tl.maximum(nonzero, 1.0)
        i = 0
        moving = together
        while moving:
            here = s.to(tl.float32)
            if (i > 0) | COLD:
                at_ptr = parts_ptr + (turn % 2) * (SUMS * programs)
                _read(
                    x,
                    at_ptr,
                    short,
                    here,
                    scale,
                    reach,
                    size,
                    part,
                    programs,
                    False,
                    SIGNED,
                    SIDED,
                    POINTED,
                    UNROLL,
                    LANES,
                )
                turn += 1
                together = together & _meet(arrived_ptr, turn * programs, POLLS)
                excess = tl.sum(_parts(at_ptr, 0, programs, PROGRAMS))
                outside = tl.sum(_parts(at_ptr, 1, programs, PROGRAMS))
            before = here.to(tl.float64)
            s, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi = _propose(
                before, ks, nonzero, excess, outside, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi
            )
            i += 1
            moving = together & (tl.abs(s - before) > tolerance * s) & (i < iterations)
        found = tl.where(together, _answer(s, unit, reach, total), float("nan"))
        if part == 0:
            tl.store(answer_ptr, found)
        if STEP:
            if part == 0:  # all programs read the guess before their first barrier
                _take_over(found, last_ptr, average_ptr, momentum, together)
                if counts:
                    tl.store(count_ptr, tl.load(count_ptr) + 1)
            full = _full_scale(found, levels, resolution)
            first = part.to(tl.int64) * (UNROLL * LANES)
            while first < size:
                offsets = _tile(first, UNROLL, LANES)
                mask = offsets < size
                value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
                rounded = _round(value, full, resolution, lowest, highest)
                tl.store(to_ptr + offsets, rounded, mask=mask)
                first += programs * (UNROLL * LANES)
        row += groups


@triton.jit
def overhang_part(x_ptr, s_ptr, parts_ptr, n, programs, halfway, BLOCK: tl.constexpr):
    """Store each program's part of a row's overhang; x [rows, n], s float32 [rows] -> parts [rows, programs]."""
    row, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    t = tl.load(s_ptr + row) * halfway
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first = part.to(tl.int64) * BLOCK
    while first < n:
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + offsets, mask=offsets < n, other=0.0).to(tl.float32)
        total += tl.where(x > t, x - t, 0.0) + tl.where(x < -t, x + t, 0.0)
        first += programs * BLOCK
    tl.store(parts_ptr + row * programs + part, tl.sum(total))


@triton.jit
def orient_row(parts_ptr, s_ptr, before_ptr, out_ptr, programs, clearly, STAYS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Store s with signs; parts [rows, programs], s and before float32 [rows]; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PROGRAMS)
    overhang = tl.sum(tl.load(parts_ptr + row * programs + index, mask=index < programs, other=0.0))
    s = tl.load(s_ptr + row)
    if STAYS:
        sign = tl.where(tl.load(before_ptr + row) < 0, -1.0, 1.0)
        sign = tl.where(overhang * sign > clearly * s, -sign, sign)
    else:
        sign = tl.where(overhang > 0, -1.0, 1.0)
    tl.store(out_ptr + row, s * sign)


@triton.jit
def _in_tile(rows, n, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the tile of a program, one of `blocks` for ROWS rows.

    These are its rows, [ROWS], and which of them exist; the offsets of its elements, [ROWS, BLOCK], and which of them
    exist.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    return row, present, row[:, None] * n + column[None, :], present[:, None] & (column < n)[None, :]


@triton.jit
def fake_quantize(
    x_ptr,
    s_ptr,
    out_ptr,
    rows,
    n,
    blocks,
    levels,
    resolution,
    lowest,
    highest,
    AFFINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round x to out, both [rows, n]; `blocks` programs for ROWS rows.

    s: float32 [rows]; if AFFINE, low and high, [2, rows], with `resolution` steps between them.
    """
    row, present, at, mask = _in_tile(rows, n, blocks, ROWS, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + row, mask=present, other=1.0)[:, None]
    if AFFINE:
        high = tl.load(s_ptr + rows + row, mask=present, other=1.0)[:, None]
        s, lowest, highest = _between(s, high, resolution)
        resolution = 1.0
    else:
        s = _full_scale(s, levels, resolution)
    tl.store(out_ptr + at, _round(x, s, resolution, lowest, highest), mask=mask)


@triton.jit
def _passed(grad, x, low, high, MAD: tl.constexpr):
    """Return the gradient that the estimator passes on, float32."""
    if MAD:
        clipped = tl.where(x < low, low, x)
        clipped = tl.where(clipped > high, high, clipped)
        out = tl.where(x == 0, 1.0, tl.div_rn(clipped, tl.where(x == 0, 1.0, x))) * grad
    else:
        out = tl.where((x >= low) & (x <= high), grad, 0.0)
    return out


@triton.jit
def fake_quantize_backward(
    grad_ptr,
    x_ptr,
    s_ptr,
    out_ptr,
    rows,
    n,
    blocks,
    SIGNED: tl.constexpr,
    ENDS: tl.constexpr,
    MAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient for x to out; grad, x, out [rows, n]; `blocks` programs for ROWS rows.

    s: float32 [rows]; if ENDS, low and high, [2, rows].
    """
    row, present, at, mask = _in_tile(rows, n, blocks, ROWS, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=1.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + row, mask=present, other=1.0)[:, None]
    if ENDS:
        low, s = s, tl.load(s_ptr + rows + row, mask=present, other=1.0)[:, None]
    else:
        s = tl.abs(s)
        low = -s if SIGNED else s * 0
    tl.store(out_ptr + at, _passed(grad, x, low, s, MAD), mask=mask)


@triton.jit
def fake_quantize_backward_of_many(
    table_ptr, tiles_ptr, s_ptr, grad_ptr, SIGNED: tl.constexpr, MAD: tl.constexpr, BLOCK: tl.constexpr
):
    """As `fake_quantize_backward` for several tensors, each of which is described in TABLE; grad is updated in place.

    tiles: int64 [programs, 2], each program's tensor and the first of its BLOCK elements. s, grad: of all tensors, one
    after another.
    """
    tensor = tl.load(tiles_ptr + 2 * tl.program_id(0))
    at = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    n = _entry(table_ptr, tensor, 5)
    mask = at < _entry(table_ptr, tensor, 4) * n
    x_ptr = _entry(table_ptr, tensor, 0).to(grad_ptr.dtype)
    grad_ptr += _entry(table_ptr, tensor, 7)
    x = tl.load(x_ptr + at, mask=mask, other=1.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.abs(tl.load(s_ptr + _entry(table_ptr, tensor, 6) + at // n, mask=mask, other=1.0))
    low = -s if SIGNED else s * 0
    tl.store(grad_ptr + at, _passed(grad, x, low, s, MAD), mask=mask)


@triton.jit
def learned_backward(
    grad_ptr,
    x_ptr,
    s_ptr,
    out_ptr,
    parts_ptr,
    rows,
    n,
    blocks,
    levels,
    resolution,
    lowest,
    highest,
    SIGNED: tl.constexpr,
    AFFINE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `fake_quantize_backward` for a learned grid, with the sums of each program in parts.

    parts: float32 [blocks, rows], for the step size or the scalar; if AFFINE, as much again for the lower bound.
    """
    row, present, at, mask = _in_tile(rows, n, blocks, ROWS, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + row, mask=present, other=1.0)[:, None]
    if ROUNDING:
        base = 0.0
        if AFFINE:
            high = tl.load(s_ptr + rows + row, mask=present, other=1.0)[:, None]
            s, lowest, highest = _between(s, high, resolution)
            base, resolution = lowest, 1.0
        else:
            s = _full_scale(s, levels, resolution)
        steps = _steps(x, s, resolution)
        inside = (steps > lowest) & (steps < highest)
        of_scale = grad * (_code(steps, lowest, highest) - tl.where(inside, steps, base))
    else:
        above, below = x >= s, x <= (-s if SIGNED else s * 0)
        inside = ~(above | below)
        of_scale = tl.where(above, grad, 0.0)
        if SIGNED:
            of_scale -= tl.where(below, grad, 0.0)
    tl.store(out_ptr + at, tl.where(inside, grad, 0.0), mask=mask)
    to = parts_ptr + tl.program_id(0) % blocks * rows + row
    tl.store(to, tl.sum(of_scale, axis=1), mask=present)
    if AFFINE:
        of_low = tl.where(inside, 0.0, grad) if SIGNED else grad * 0
        tl.store(to + blocks * rows, tl.sum(of_low, axis=1), mask=present)
