"""The operations on a CUDA device, in Triton, for float32, bfloat16 and float16. Nothing waits for the device.

A row that fits into registers is read once, and solved to convergence by one program. For longer rows, such as
activations, each iteration is one read by many programs, and a small kernel that proposes the next s; what has
converged is noticed on the device, where the reads that are left then do nothing. All launches depend on shapes alone,
so a CUDA graph can hold them. Other dtypes, devices and granularities are left to `eager`.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import eager
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.views import like, rows_beside, rows_of, with_scalars
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import largest

SERVED = (torch.float32, torch.bfloat16, torch.float16)
REGISTERS = {1024: 4, 4096: 8, 16384: 16}
"""Elements of a row that one program holds, and its number of warps."""
BLOCK = 1024
PROGRAMS = 512
"""Programs that share the reading of a long row, at most."""
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits for a fraction, so halves go to even

# A row's state, float64: s, unit, done, k, nonzero, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi; see newton.py.
STATE = tl.constexpr(11)
SUMS = tl.constexpr(6)


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav`; each row stops on its own."""
    rows = rows_of(x, search.dims) if _serves(x) and search.pool is None else None
    if rows is None:
        return eager.octav(x, cost, guess, search)
    start = (largest(x, cost.signed, search.dims) if guess is None else guess).to(torch.float32).contiguous()
    s = torch.empty_like(start)
    solve = _solve_short if rows.shape[1] <= max(REGISTERS) else _solve_long
    solve(rows, start, s, cost, search, guess is None)
    return s


octav_interval = eager.octav_interval
octav_and_quantize = eager.octav_and_quantize
remember = eager.remember


def orient(
    x: Tensor, s: Tensor, before: Tensor | None, halfway: float, clearly: float, pool: Pool | None = None
) -> Tensor:
    """As `eager.orient`; one read."""
    flat = with_scalars(x, s) if _serves(x) and pool is None else None
    if flat is None:
        return eager.orient(x, s, before, halfway, clearly, pool)
    rows, scalars = flat
    programs = min(triton.cdiv(rows.shape[1], BLOCK), PROGRAMS)
    parts = rows.new_empty((len(rows), programs), dtype=torch.float32)
    signs, out = scalars if before is None else before.to(torch.float32).contiguous(), torch.empty_like(scalars)
    _overhang_part[(len(rows) * programs,)](rows, scalars, parts, rows.shape[1], programs, halfway, BLOCK=BLOCK)
    _orient_row[(len(rows),)](
        parts, scalars, signs, out, programs, clearly * rows.shape[1], STAYS=before is not None, PROGRAMS=PROGRAMS
    )
    return out.reshape(s.shape)


def refine(x: Tensor, s: Tensor, format: IntFormat, factors: Sequence[float]) -> Tensor:
    """As `eager.refine`, by it: for rows of few elements, in a small part of a network."""
    return eager.refine(x, s, format, factors)


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`; one read and one write."""
    flat = with_scalars(x, s, format.parts) if _serves(x) else None
    if flat is None or not isinstance(format, IntFormat | IntAffineFormat):
        return eager.fake_quantize(x, s, format)
    rows, scalars = flat
    affine = isinstance(format, IntAffineFormat)
    resolution = format.resolution if isinstance(format, IntFormat) else format.levels_per_scalar
    out = torch.empty_like(rows)
    blocks = triton.cdiv(rows.shape[1], BLOCK)
    _fake_quantize[(len(rows) * blocks,)](
        rows,
        format.full_scale(scalars) if isinstance(format, IntFormat) else scalars,
        out,
        len(rows),
        rows.shape[1],
        blocks,
        float(resolution),
        float(format.lowest),
        float(format.highest),
        AFFINE=affine,
        BLOCK=BLOCK,
    )
    return like(out, x)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`; two reads and one write."""
    if gradient == "ste":
        return grad
    flat = with_scalars(x, s, format.parts) if _serves(x) else None
    if flat is None:
        return eager.fake_quantize_backward(grad, x, s, format, gradient)
    rows, scalars = flat
    grad_rows = rows_beside(grad, x, rows)
    out = torch.empty_like(grad_rows)
    blocks = triton.cdiv(rows.shape[1], BLOCK)
    _fake_quantize_backward[(len(rows) * blocks,)](
        grad_rows,
        rows,
        scalars,
        out,
        len(rows),
        rows.shape[1],
        blocks,
        SIGNED=format.signed,
        ENDS=format.parts == 2,
        MAD=gradient == "mad",
        BLOCK=BLOCK,
    )
    return like(out, x)


def _serves(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter)  # subclasses need not have memory, or mean something else by it
    return plain and x.dtype in SERVED and (x.device.type == "cuda" or interpreted())


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as it does for tests."""
    return bool(triton.knobs.runtime.interpret)


def _solve_short(rows: Tensor, start: Tensor, s: Tensor, cost: Cost, search: Search, cold: bool) -> None:
    block, warps = next((block, warps) for block, warps in REGISTERS.items() if rows.shape[1] <= block)
    _solve_row[(len(rows),)](
        rows,
        start,
        _short_sides(cost, start),
        s,
        rows.shape[1],
        cost.noise,
        cost.reach,
        search.tolerance,
        search.iterations,
        **_kind(cost),
        COLD=cold,
        BLOCK=block,
        num_warps=warps,
    )


def _solve_long(rows: Tensor, start: Tensor, s: Tensor, cost: Cost, search: Search, cold: bool) -> None:
    n, programs = rows.shape[1], min(triton.cdiv(rows.shape[1], BLOCK), PROGRAMS)
    short, kind = _short_sides(cost, start), _kind(cost)
    state = rows.new_empty((len(rows), STATE.value), dtype=torch.float64)
    parts = rows.new_empty((len(rows), SUMS.value, programs), dtype=torch.float32)
    _begin[(len(rows),)](start, state, cost.noise, cost.reach)
    for i in range(search.iterations + cold):
        _sum_part[(len(rows) * programs,)](rows, state, short, parts, n, programs, cost.reach, **kind, BLOCK=BLOCK)
        _advance_row[(len(rows),)](
            state, parts, s, programs, cost.reach, search.tolerance, COLD=cold and i == 0, PROGRAMS=PROGRAMS
        )


def _short_sides(cost: Cost, start: Tensor) -> Tensor:
    """Signs of the short sides, float32 [rows]; something that is not looked at where there are none."""
    return start if cost.short is None else cost.short.to(torch.float32).contiguous()


def _kind(cost: Cost) -> dict[str, bool]:
    """What decides how a kernel is compiled."""
    return {"SIGNED": cost.signed, "SIDED": cost.sided, "POINTED": cost.short is not None}


@triton.jit
def _power_of_two(t):
    """t float32 -> the power of two at or below it, float32; 1 where t is not positive and finite."""
    t = tl.where((t > 0) & (t < float("inf")), t, 1.0)
    t = tl.minimum(tl.maximum(t, 1.1754943508222875e-38), 8.507059173023462e37)
    return (t.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _start(guess):
    """guess float32 -> s in units of its power of two, float64, and the unit, float32."""
    unit = _power_of_two(guess)
    guess = tl.where((guess > 0) & (guess < float("inf")), guess, 1.0)
    return (guess / unit).to(tl.float64), unit


@triton.jit
def _magnitude(x, short, reach, SIGNED: tl.constexpr, SIDED: tl.constexpr, POINTED: tl.constexpr):
    """Magnitudes of x, and their weights (`cost.sided`)."""
    if SIDED:
        if POINTED:
            x = tl.where(short < 0, -x, x)
        return tl.where(x < 0, -x * reach, x), tl.where(x < 0, 1.0 / (reach * reach), 1.0)
    return tl.abs(x) if SIGNED else tl.where(x < 0, 0.0, x), tl.where(x < 0, 1.0, 1.0)


@triton.jit
def _propose(s, k, nonzero, excess, outside, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi):
    """`newton.advance` of one row; all float64 scalars. Returns the next s and the interval."""
    above = excess + s * outside
    cost = k * s * (nonzero - outside)
    short = cost < excess
    lower = (not short) & (s <= hi)
    lo, hi = tl.where(short, s, lo), tl.where(lower, s, hi)
    sum_lo, sum_hi = tl.where(short, above, sum_lo), tl.where(lower, above, sum_hi)
    outside_lo, outside_hi = tl.where(short, outside, outside_lo), tl.where(lower, outside, outside_hi)

    between = outside_lo - outside_hi
    mean = tl.where(between > 0, (sum_lo - sum_hi) / tl.maximum(between, 1.0), 0.0)
    newton_lo = sum_lo / tl.maximum(k * (nonzero - outside_lo) + outside_lo, k)
    newton_hi = sum_hi / tl.maximum(k * (nonzero - outside_hi) + outside_hi, k)
    exact = (between <= 1) | (mean >= hi * (1 - 1e-6))
    closed = tl.minimum(tl.minimum(newton_lo, tl.maximum(mean, newton_hi)), hi)
    # Where either is zero the logarithms are of no use, and must not be infinite.
    usable = (cost > 0) & (excess > 0)
    safe_cost, safe_excess, safe_s = tl.where(usable, cost, 1.0), tl.where(usable, excess, 1.0), tl.where(s > 0, s, 1.0)
    log_newton = s - (tl.log(safe_cost) - tl.log(safe_excess)) / (1 / safe_s + outside / safe_excess)
    returns = tl.where(short, log_newton >= hi * (1 - 2e-7), log_newton <= lo * (1 + 2e-7))
    fits = usable & (((lo < log_newton) & (log_newton < hi) & (not returns)) | (log_newton == s))
    divides = tl.where((lo < mean) & (mean < hi), mean, (lo + hi) / 2)  # sums are not exact
    half_way = tl.where(newton_lo < divides, (newton_lo + hi) / 2, divides)
    proposal = tl.where((lo == 0) & (outside == 0), 0.8 * hi, half_way)
    proposal = tl.where(fits, log_newton, proposal)
    proposal = tl.where(exact, closed, proposal)
    return proposal, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi


@triton.jit
def _solve_row(
    x_ptr,
    guess_ptr,
    short_ptr,
    s_ptr,
    n,
    k,
    reach,
    tolerance,
    iterations,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    COLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [rows, n] with n <= BLOCK, guess, short and s float32 [rows]; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    raw, weight = _magnitude(x, tl.load(short_ptr + row), reach, SIGNED, SIDED, POINTED)
    s, unit = _start(tl.load(guess_ptr + row) * reach)
    a = raw * (1.0 / unit)
    k = s * 0 + k  # float64
    nonzero = tl.sum(tl.where(raw > 0, weight, 0.0)).to(tl.float64)
    if SIDED:
        k = k * tl.sum((raw > 0).to(tl.float32)).to(tl.float64) / tl.maximum(nonzero, 1.0)
    total = tl.sum(weight * a).to(tl.float64)
    hi = tl.max(a).to(tl.float64)
    lo, sum_lo, outside_lo, sum_hi, outside_hi = s * 0, total, nonzero, s * 0, s * 0
    if COLD:
        s = total / tl.maximum(nonzero, 1.0)
    i = 0
    moving = True
    while (i < iterations) & moving:
        here = s.to(tl.float32)
        excess = tl.sum(tl.where(a > here, weight * (a - here), 0.0)).to(tl.float64)
        outside = tl.sum(tl.where(a > here, weight, 0.0)).to(tl.float64)
        before = here.to(tl.float64)
        s, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi = _propose(
            before, k, nonzero, excess, outside, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi
        )
        moving = tl.abs(s - before) > tolerance * s
        i += 1
    tl.store(s_ptr + row, tl.div_rn((s * unit).to(tl.float32), reach))


@triton.jit
def _begin(guess_ptr, state_ptr, k, reach):
    """guess float32 [rows] -> state [rows, STATE]; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    s, unit = _start(tl.load(guess_ptr + row) * reach)
    state = state_ptr + row * STATE
    tl.store(state, s)
    tl.store(state + 1, unit.to(tl.float64))
    tl.store(state + 2, 0.0)
    tl.store(state + 3, s * 0 + k)
    for i in range(4, STATE):
        tl.store(state + i, 0.0)
    tl.store(state + 8, float("inf"))  # "hi" before anything is known


@triton.jit
def _sum_part(
    x_ptr,
    state_ptr,
    short_ptr,
    parts_ptr,
    n,
    programs,
    reach,
    SIGNED: tl.constexpr,
    SIDED: tl.constexpr,
    POINTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [rows, n] -> parts [rows, SUMS, programs]: each program's share of a row's sums."""
    row, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    state = state_ptr + row * STATE
    if tl.load(state + 2) == 0:
        s, scale = tl.load(state).to(tl.float32), 1.0 / tl.load(state + 1).to(tl.float32)
        excess = tl.zeros([BLOCK], dtype=tl.float32)
        outside = tl.zeros([BLOCK], dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        nonzero = tl.zeros([BLOCK], dtype=tl.float32)
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        count = tl.zeros([BLOCK], dtype=tl.float32)
        short = tl.load(short_ptr + row)
        first = part * BLOCK
        while first < n:  # no range: some interpreters cannot count to what is not a constant
            offsets = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * n + offsets, mask=offsets < n, other=0.0).to(tl.float32)
            raw, weight = _magnitude(x, short, reach, SIGNED, SIDED, POINTED)
            a = raw * scale
            excess += tl.where(a > s, weight * (a - s), 0.0)
            outside += tl.where(a > s, weight, 0.0)
            total += weight * a
            nonzero += tl.where(raw > 0, weight, 0.0)
            count += (raw > 0).to(tl.float32)
            largest = tl.maximum(largest, a)
            first += programs * BLOCK
        to = parts_ptr + row * SUMS * programs + part
        tl.store(to, tl.sum(excess))
        tl.store(to + programs, tl.sum(outside))
        tl.store(to + 2 * programs, tl.sum(total))
        tl.store(to + 3 * programs, tl.sum(nonzero))
        tl.store(to + 4 * programs, tl.max(largest))
        tl.store(to + 5 * programs, tl.sum(count))


@triton.jit
def _advance_row(state_ptr, parts_ptr, s_ptr, programs, reach, tolerance, COLD: tl.constexpr, PROGRAMS: tl.constexpr):
    """Propose a row's next s from the sums at its present one, or begin a cold start with the mean; one program a row.

    s [rows], float32, is written in units of x.
    """
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + 2) == 0:
        index = tl.arange(0, PROGRAMS)
        parts, present = parts_ptr + row * SUMS * programs + index, index < programs
        excess = tl.sum(tl.load(parts, mask=present, other=0.0).to(tl.float64))
        outside = tl.sum(tl.load(parts + programs, mask=present, other=0.0).to(tl.float64))
        total = tl.sum(tl.load(parts + 2 * programs, mask=present, other=0.0).to(tl.float64))
        nonzero = tl.sum(tl.load(parts + 3 * programs, mask=present, other=0.0).to(tl.float64))
        largest = tl.max(tl.load(parts + 4 * programs, mask=present, other=0.0)).to(tl.float64)
        count = tl.sum(tl.load(parts + 5 * programs, mask=present, other=0.0).to(tl.float64))
        unit, k = tl.load(state + 1), tl.load(state + 3)
        before = tl.load(state).to(tl.float32).to(tl.float64)
        lo, sum_lo, outside_lo = tl.load(state + 5), tl.load(state + 6), tl.load(state + 7)
        hi, sum_hi, outside_hi = tl.load(state + 8), tl.load(state + 9), tl.load(state + 10)
        first = hi == float("inf")
        k = tl.where(first & (nonzero > 0), k * (count / tl.where(nonzero > 0, nonzero, 1.0)), k)
        hi = tl.where(first, largest, hi)
        sum_lo, outside_lo = tl.where(first, total, sum_lo), tl.where(first, nonzero, outside_lo)
        s, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi = _propose(
            before, k, nonzero, excess, outside, lo, sum_lo, outside_lo, hi, sum_hi, outside_hi
        )
        done = tl.abs(s - before) <= tolerance * s
        if COLD:
            s = total / tl.maximum(nonzero, 1.0)
            done = s < 0  # never
        tl.store(state, s)
        tl.store(state + 2, done.to(tl.float64))
        tl.store(state + 3, k)
        tl.store(state + 4, nonzero)
        tl.store(state + 5, lo)
        tl.store(state + 6, sum_lo)
        tl.store(state + 7, outside_lo)
        tl.store(state + 8, hi)
        tl.store(state + 9, sum_hi)
        tl.store(state + 10, outside_hi)
        tl.store(s_ptr + row, tl.div_rn((s * unit).to(tl.float32), reach))


@triton.jit
def _overhang_part(x_ptr, s_ptr, parts_ptr, n, programs, halfway, BLOCK: tl.constexpr):
    """x [rows, n], s float32 [rows] -> parts [rows, programs]: each program's share of a row's overhang."""
    row, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    t = tl.load(s_ptr + row) * halfway
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first = part * BLOCK
    while first < n:  # no range: some interpreters cannot count to what is not a constant
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + offsets, mask=offsets < n, other=0.0).to(tl.float32)
        total += tl.where(x > t, x - t, 0.0) + tl.where(x < -t, x + t, 0.0)
        first += programs * BLOCK
    tl.store(parts_ptr + row * programs + part, tl.sum(total))


@triton.jit
def _orient_row(parts_ptr, s_ptr, before_ptr, out_ptr, programs, clearly, STAYS: tl.constexpr, PROGRAMS: tl.constexpr):
    """parts [rows, programs], s and before float32 [rows] -> s with signs; one program a row."""
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
def _fake_quantize(
    x_ptr,
    s_ptr,
    out_ptr,
    rows,
    n,
    blocks,
    resolution,
    lowest,
    highest,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, out [rows, n], s float32 [rows], full scales, or low and high [2, rows], with `resolution` steps between them;
    `blocks` programs a row."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    s = tl.load(s_ptr + row)
    if AFFINE:
        low = s
        s = tl.div_rn(tl.load(s_ptr + rows + row) - low, resolution)
        zero = tl.div_rn(-low, tl.where(s == 0, 1.0, s))
        zero = (tl.minimum(tl.maximum(zero, 0.0), resolution) + ROUND) - ROUND
        lowest, highest, resolution = -zero, resolution - zero, 1.0
    x = tl.load(x_ptr + row * n + offsets, mask=mask).to(tl.float32)
    code = tl.div_rn(x, tl.where(s == 0, 1.0, s)) * resolution
    code = tl.where(code < lowest, lowest, code)  # NaN stays NaN
    code = tl.where(code > highest, highest, code)
    code = (code + ROUND) - ROUND
    tl.store(out_ptr + row * n + offsets, code * (1.0 / resolution) * s, mask=mask)


@triton.jit
def _fake_quantize_backward(
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
    BLOCK: tl.constexpr,
):
    """grad, x, out [rows, n], s float32 [rows], or low and high [2, rows]; `blocks` programs a row."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    s = tl.load(s_ptr + row)
    if ENDS:
        low, s = s, tl.load(s_ptr + rows + row)
    else:
        s = tl.abs(s)
        low = -s if SIGNED else s * 0
    x = tl.load(x_ptr + row * n + offsets, mask=mask, other=1.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * n + offsets, mask=mask, other=0.0).to(tl.float32)
    if MAD:
        clipped = tl.where(x < low, low, x)
        clipped = tl.where(clipped > s, s, clipped)
        out = tl.where(x == 0, 1.0, tl.div_rn(clipped, tl.where(x == 0, 1.0, x))) * grad
    else:
        out = tl.where((x >= low) & (x <= s), grad, 0.0)
    tl.store(out_ptr + row * n + offsets, out, mask=mask)
