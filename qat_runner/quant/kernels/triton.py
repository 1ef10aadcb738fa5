"""The operations on a CUDA device, in Triton, for float32, bfloat16 and float16. Nothing waits for the device.

| operation                            | launches                        | reads of x                         |
|--------------------------------------|---------------------------------|------------------------------------|
| a step, or a solution, of short rows | 1                               | 1                                  |
| the same of long rows                | 2: one zeroes counters           | one an iteration, and one to round |
| a solution of two ends               | 1, or 2 for long rows            | 1, or one an iteration             |
| steps of many tensors                | one a size of tiles, 2 for long | as above                           |
| their gradients                      | 1, and copies                   | 1                                  |
| `remember`                           | 1                               |                                    |
| `fake_quantize`, its gradient        | 1 each                          | 1                                  |
| `learned_backward`                   | 2: one sums what programs have  | 1                                  |
| `orient`                             | 2                               | 1                                  |

A row that fits into registers is read once, and solved to convergence by one program, which holds many rows where they
are short. A longer row, such as an activation, is shared by as many programs as the device holds at once; they are
launched cooperatively, so that all of them are there, and meet after each read. The alternative, a launch an iteration,
must issue as many as an iteration may take, whether or not the row has converged.

A meeting that does not come about ends after some seconds, with NaN for s, since no program can end a launch: a run
then stops at its loss, instead of keeping the device forever. The counters of meetings are fresh
memory in each call: kept ones would be shared by streams, and by CUDA graphs and what runs beside them.

Several tensors come as a table of addresses on the device, which is kept for as long as they lie where they do: the
weights of a network, step by step.

All launches depend on shapes alone, so a CUDA graph can hold them. In it several tensors are solved one by one, by
kernels that must have been called so before, since none can be loaded while a graph is captured.

Other dtypes, devices and granularities are left to `eager`.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import eager, remembered
from qat_runner.quant.kernels import triton_intervals as intervals
from qat_runner.quant.kernels import triton_kernels as device
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.kernels.views import beside, dense, extent, floats
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import kept

CALLS_COST = True  # see eager
SERVED = (torch.float32, torch.bfloat16, torch.float16)
REGISTERS = {1024: 4, 4096: 8, 16384: 16}
"""Elements that one program holds, and its number of warps."""
HELD = 512
"""Elements of several short rows that a program holds: with twice as many, what it knows of each row spills."""
BLOCK = 4096
"""Elements of a long row, in float32, that a program loads at a time: 16 KB."""
PROGRAMS = 512
"""Programs that share the reading of a long row, at most; a power of two."""
WARPS = 8
"""Of a program that reads a part of a long row."""
RESIDENT = 2
"""Such programs on a multiprocessor. With MAXNREG registers a thread that many fit, as they must to meet."""
MAXNREG = 128
SIZES = (64, 1024, 4096, 8192, 16384)
"""Elements of the short rows of several tensors: those up to each of these are in one launch."""
ALIGNED = 16
"""Elements by which tensors that lie one behind another are aligned."""
POLLS = 1 << 22
"""How often a program asks whether the others have come before it gives up; about a microsecond each."""


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav`; each row stops on its own."""
    where, s = dense(x), x.new_empty(kept(x, search.dims), dtype=torch.float32)
    size = extent(where, s) if _serves(x) and search.pool is None else None
    if size is None:
        return eager.octav(x, cost, guess, search)
    _solve(where, size, None if guess is None else floats(guess.expand(s.shape)), s, cost, search)
    return s


def octav_interval(x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav_interval`; each row stops on its own."""
    where, ends = dense(x), x.new_empty((2, *kept(x, search.dims)), dtype=torch.float32)
    size = extent(where, ends, 2) if _serves(x) and search.pool is None else None
    if size is None:
        return eager.octav_interval(x, noise, guess, search)
    start = ends if guess is None else floats(guess.expand(ends.shape))
    numbers = noise, math.sqrt(12 * noise), search.tolerance, search.iterations
    rows, n = size
    with _on(x):
        if n <= (most := max(REGISTERS) // 2):  # with as many as elsewhere, what it knows spills
            held, block = _tile(n, most)
            kind = {"ROWS": held, "BLOCK": block, "num_warps": _warps(held * block)}
            intervals.intervals_of_rows[(triton.cdiv(rows, held),)](
                where, start, ends, rows, n, *numbers, COLD=guess is None, **kind
            )
        else:
            share = _shared(size, x, intervals.SUMS.value, BLOCK)
            intervals.intervals_of_long[(share.groups * share.programs,)](
                *(where, start, ends, share.parts, share.arrived, rows, n, share.programs, share.groups, *numbers),
                COLD=guess is None,
                **share.kind,
            )
    return ends


def octav_and_quantize(
    x: Tensor, cost: Cost, format: IntFormat, search: Search, state: Remembered, warm: bool
) -> tuple[Tensor, Tensor]:
    """As `eager.octav_and_quantize`; in the launches of a solution."""
    where = dense(x)
    size = extent(where, state.s) if _serves(x) and search.pool is None and state.holds(x.device) else None
    if size is None:
        return eager.octav_and_quantize(x, cost, format, search, state, warm)
    s, out = torch.empty_like(state.s), torch.empty_like(where)
    _solve(where, size, state.s if warm and state.known else None, s, cost, search, (format, state, out))
    state.written()
    return s, out


def octav_and_quantize_all(
    xs: Sequence[Tensor],
    cost: Cost,
    format: IntFormat,
    searches: Sequence[Search],
    states: Sequence[Remembered],
    warm: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `eager.octav_and_quantize_all`; launches by the sizes of rows, not by the number of tensors."""
    x, search, state = xs[0], searches[0], states[0]
    many = _many(xs, [state.s for state in states], states) if _alike(xs, states) and cost.short is None else None
    if many is None or search.pool is not None:
        return eager.one_by_one(octav_and_quantize, xs, cost, format, searches, states, warm)
    s, out = x.new_empty(many.scalars, dtype=torch.float32), x.new_empty(many.elements)
    kind = {"SIGNED": cost.signed, "SIDED": cost.sided, "COLD": not (warm and state.known)}
    numbers = cost.noise, cost.reach, search.tolerance, search.iterations, state.weight, *_levels(format)
    with _on(x):
        for (held, block), tiles in many.tiles.items():
            device.solve_rows_of_many[(len(tiles),)](
                many.table, tiles, s, out, *numbers, **kind, ROWS=held, BLOCK=block, num_warps=_warps(held * block)
            )
        if many.long is not None:
            pointers = many.long, s, s, s, s, s, out
            kind |= {"POINTED": False, "STEP": True, "MANY": True}
            _solve_long((len(many.long), many.longest), pointers, numbers, kind)
    for state in states:
        state.written()
    return many.split(s, [state.s for state in states], many.first_scalars), many.split(out, xs, many.first_elements)


def remember(s: Tensor, state: Remembered) -> None:
    """As `remembered.remember`; one launch."""
    if not (_serves(s) and state.holds(s.device)):
        remembered.remember(s, state)
        return
    s, block = floats(s.expand(state.s.shape)), min(REGISTERS)
    with _on(s):
        device.remember[(triton.cdiv(s.numel(), block),)](
            s, state.s, state.running_s, state.batches, s.numel(), state.weight, BLOCK=block
        )
    state.written()


def orient(
    x: Tensor, s: Tensor, before: Tensor | None, halfway: float, clearly: float, pool: Pool | None = None
) -> Tensor:
    """As `eager.orient`; one read."""
    where = dense(x)
    size = extent(where, s) if _serves(x) and pool is None else None
    if size is None:
        return eager.orient(x, s, before, halfway, clearly, pool)
    rows, n = size
    scalars, signs = floats(s), floats(before)
    programs = min(triton.cdiv(n, BLOCK), PROGRAMS)
    parts, out = x.new_empty((rows, programs), dtype=torch.float32), torch.empty_like(scalars)
    stays, signs = signs is not None, scalars if signs is None else signs
    with _on(x):
        device.overhang_part[(rows * programs,)](
            where, scalars, parts, n, programs, halfway, BLOCK=BLOCK, num_warps=WARPS
        )
        device.orient_row[(rows,)](parts, scalars, signs, out, programs, clearly * n, STAYS=stays, PROGRAMS=PROGRAMS)
    return out


def refine(x: Tensor, s: Tensor, format: IntFormat, factors: Sequence[float]) -> Tensor:
    """As `eager.refine`, by it: for rows of few elements, in a small part of a network."""
    return eager.refine(x, s, format, factors)


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`; one read and one write."""
    where = dense(x)
    size = extent(where, s, format.parts) if _serves(x) else None
    if size is None or not isinstance(format, IntFormat | IntAffineFormat):
        return eager.fake_quantize(x, s, format)
    out = torch.empty_like(where)
    _in_tiles(
        device.fake_quantize,
        (where, floats(s), out),
        size,
        *_levels(format),
        AFFINE=isinstance(format, IntAffineFormat),
    )
    return out


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`; two reads and one write."""
    if gradient == "ste":
        return grad
    where = dense(x)
    size = extent(where, s, format.parts) if _serves(x) else None
    if size is None:
        return eager.fake_quantize_backward(grad, x, s, format, gradient)
    out = torch.empty_like(where, dtype=grad.dtype)
    _in_tiles(
        device.fake_quantize_backward,
        (beside(grad, where), where, floats(s), out),
        size,
        SIGNED=format.signed,
        ENDS=format.parts == 2,
        MAD=gradient == "mad",
    )
    return out


def fake_quantize_backward_all(
    grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat, gradient: str
) -> list[Tensor]:
    """As `eager.fake_quantize_backward_all`; one launch, and the copies that bring gradients side by side."""
    if gradient == "ste":
        return list(grads)
    many = _many(xs, ss) if _alike([*xs, *grads]) else None
    if many is None:
        return [fake_quantize_backward(*part, format, gradient) for part in zip(grads, xs, ss, strict=True)]
    passed = xs[0].new_empty(many.elements)
    outs = many.split(passed, xs, many.first_elements)
    torch._foreach_copy_(outs, list(grads))
    s = torch.cat([s.reshape(-1) for s in ss])
    with _on(passed):
        device.fake_quantize_backward_of_many[(len(many.pieces),)](
            many.table,
            many.pieces,
            s,
            passed,
            SIGNED=format.signed,
            MAD=gradient == "mad",
            BLOCK=BLOCK,
            num_warps=_warps(BLOCK),
        )
    return outs


def learned_backward(
    grad: Tensor, x: Tensor, s: Tensor, format: IntFormat | IntAffineFormat, rounding: bool
) -> tuple[Tensor, Tensor]:
    """As `eager.learned_backward`; two reads and one write, and sums of what each program has summed."""
    where = dense(x)
    size = extent(where, s, format.parts) if _serves(x) else None
    if size is None:
        return eager.learned_backward(grad, x, s, format, rounding)
    rows, n = size
    blocks = triton.cdiv(n, _tile(n, BLOCK)[1])
    out = torch.empty_like(where, dtype=grad.dtype)
    sums = x.new_empty((format.parts, blocks, rows), dtype=torch.float32)
    _in_tiles(
        device.learned_backward,
        (beside(grad, where), where, floats(s), out, sums),
        size,
        *_levels(format),
        SIGNED=format.signed,
        AFFINE=format.parts == 2,
        ROUNDING=rounding,
    )
    return out, sums.sum(1).reshape(s.shape)


def _alike(tensors: Sequence[Tensor], states: Sequence[Remembered] = ()) -> bool:
    """Whether kernels serve all of them in the same way, where they lie."""
    first = tensors[0]
    return (
        all(_serves(t) and t.dtype == first.dtype and t.device == first.device for t in tensors)
        and all(dense(t) is t for t in tensors)
        and all(state.holds(first.device) for state in states)
    )


@dataclass(frozen=True)
class _Many:
    """Several tensors, as kernels find them: where each lies, and where its results go."""

    table: Tensor
    """see `triton_kernels.FIELDS`"""
    tiles: dict[tuple[int, int], Tensor]
    """by rows and elements that a program holds: of each program, int64 [programs, 2], a tensor and its first row"""
    long: Tensor | None
    """a table of the rows that no program holds"""
    longest: int
    """elements of them"""
    pieces: Tensor
    """int64 [programs, 2]: a tensor, and the first of BLOCK elements"""
    scalars: int
    """of all tensors"""
    elements: int
    """likewise, with what aligns them"""
    first_scalars: tuple[int, ...]
    first_elements: tuple[int, ...]

    @staticmethod
    def split(whole: Tensor, like: Sequence[Tensor], first: Sequence[int]) -> list[Tensor]:
        """Parts of a tensor in the shapes and strides of others; they are no views, which autograd would follow."""
        memory = whole.untyped_storage()
        return [whole.new_empty(0).set_(memory, at, t.shape, t.stride()) for t, at in zip(like, first, strict=True)]


def _many(xs: Sequence[Tensor], ss: Sequence[Tensor], states: Sequence[Remembered] = ()) -> _Many | None:
    """Tensors with scalars, one or one a row each; None for other granularities."""
    sizes = [extent(x, s) for x, s in zip(xs, ss, strict=True)]
    if None in sizes or (xs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return None  # a graph would copy a new table when it is replayed, and calls before would find none
    places = [(x.data_ptr(), *_addresses(states[i] if states else None)) for i, x in enumerate(xs)]
    return _table(tuple(places), tuple(filter(None, sizes)), xs[0].element_size(), xs[0].device)


def _addresses(state: Remembered | None) -> tuple[int, int, int]:
    return (0, 0, 0) if state is None else tuple(t.data_ptr() for t in state[:3])  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)  # two for each group of weights
def _table(
    places: tuple[tuple[int, ...], ...], sizes: tuple[tuple[int, int], ...], size: int, where: torch.device
) -> _Many:
    """The same by addresses, of which nothing is read here; sent to the device once."""
    entries: list[tuple[int, ...]] = []
    long: list[tuple[int, ...]] = []
    tiles: dict[tuple[int, int], list[tuple[int, int]]] = {}
    pieces: list[tuple[int, int]] = []
    scalars = elements = 0
    for i, (addresses, (rows, n)) in enumerate(zip(places, sizes, strict=True)):
        entries.append((*addresses, rows, n, scalars, elements))
        pieces.extend((i, first) for first in range(0, rows * n, BLOCK))
        if n <= max(REGISTERS):
            tile = _tile(next(most for most in SIZES if n <= most), max(REGISTERS))
            tiles.setdefault(tile, []).extend((i, first) for first in range(0, rows, tile[0]))
        else:
            x, last, average, batches = addresses
            for row in range(rows):
                own = x + row * n * size, last + 4 * row, average + 4 * row, batches * (row == 0)
                long.append((*own, 1, n, scalars + row, elements + row * n))
        scalars += rows
        elements += -(-rows * n // ALIGNED) * ALIGNED
    sent = functools.partial(_sent, where=where)
    return _Many(
        sent(entries),
        {tile: sent(programs) for tile, programs in sorted(tiles.items())},
        sent(long) if long else None,
        max((entry[5] for entry in long), default=0),
        sent(pieces),
        scalars,
        elements,
        tuple(entry[6] for entry in entries),
        tuple(entry[7] for entry in entries),
    )


def _sent(rows: Sequence[tuple[int, ...]], where: torch.device) -> Tensor:
    """A table, int64, on the device, without a wait."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else table


def _in_tiles(kernel: Any, tensors: tuple[Tensor, ...], size: tuple[int, int], *numbers: float, **kind: bool) -> None:
    """Launch a kernel that goes once through rows [rows, n], a tile a program."""
    rows, n = size
    held, block = _tile(n, BLOCK)
    blocks, warps = triton.cdiv(n, block), _warps(held * block)
    with _on(tensors[0]):
        kernel[(triton.cdiv(rows, held) * blocks,)](
            *tensors, rows, n, blocks, *numbers, **kind, ROWS=held, BLOCK=block, num_warps=warps
        )


def _serves(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter)  # subclasses need not have memory, or mean something else by it
    return plain and x.dtype in SERVED and (x.device.type == "cuda" or interpreted())


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as it does for tests."""
    return bool(triton.knobs.runtime.interpret)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: while open, that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _solve(
    x: Tensor,
    size: tuple[int, int],
    guess: Tensor | None,
    s: Tensor,
    cost: Cost,
    search: Search,
    step: tuple[IntFormat, Remembered, Tensor] | None = None,
) -> None:
    """Write the scalars of rows to s.

    Args:
        x: dense.
        size: rows, and elements of each.
        guess: float32, dense, one a row; None: from cold.
        s: float32, dense, one a row.
        cost: what is minimized.
        search: see there.
        step: what to round to, what to remember s in, and where to write rows, rounded; None: only solve.
    """
    format, state, out = step or (None, None, None)
    short = floats(cost.short)
    start = state.s if state is not None else guess
    pointers = (
        x,
        s if start is None else start,  # s stands for what is not looked at
        s if short is None else short,
        s,
        s if state is None else state.running_s,
        s if state is None else state.batches,
        x if out is None else out,
    )
    numbers = (cost.noise, cost.reach, search.tolerance, search.iterations, 0.0 if state is None else state.weight)
    levels = (1.0, 1.0, 0.0, 0.0) if format is None else _levels(format)
    kind = {
        "SIGNED": cost.signed,
        "SIDED": cost.sided,
        "POINTED": short is not None,
        "COLD": guess is None,
        "STEP": step is not None,
    }
    with _on(x):
        if size[1] <= max(REGISTERS):
            _solve_short(size, pointers, (*numbers, *levels), kind)
        else:
            _solve_long(size, pointers, (*numbers, *levels), kind | {"MANY": False})


def _levels(format: IntFormat | IntAffineFormat) -> tuple[float, float, float, float]:
    """What kernels know of a format."""
    resolution = format.resolution if isinstance(format, IntFormat) else format.levels_per_scalar
    return float(format.levels_per_scalar), float(resolution), float(format.lowest), float(format.highest)


def _solve_short(
    size: tuple[int, int], pointers: tuple[Tensor, ...], numbers: tuple[float, ...], kind: dict[str, bool]
) -> None:
    rows, n = size
    held, block = _tile(n, max(REGISTERS))
    device.solve_rows[(triton.cdiv(rows, held),)](
        *pointers, rows, n, *numbers, **kind, ROWS=held, BLOCK=block, num_warps=_warps(held * block)
    )


def _solve_long(
    size: tuple[int, int], pointers: tuple[Tensor, ...], numbers: tuple[float, ...], kind: dict[str, bool]
) -> None:
    x = pointers[-1]
    share = _shared(size, x, device.SUMS.value, BLOCK * 4 // x.element_size())
    device.solve_long[(share.groups * share.programs,)](
        *(*pointers, share.parts, share.arrived, *size, share.programs, share.groups, *numbers), **kind, **share.kind
    )


class _Shared(NamedTuple):
    """How programs share the reading of long rows."""

    programs: int
    """for a row"""
    groups: int
    """of so many"""
    parts: Tensor
    """what each has read, float32 [groups, 2, sums, programs]"""
    arrived: Tensor
    """how often they have met, int32 [groups], zeros"""
    kind: dict[str, int]
    """of the launch"""


def _shared(size: tuple[int, int], x: Tensor, sums: int, block: int) -> _Shared:
    """For rows [rows, n] of the dtype of x, so many sums of each read, and elements that are loaded at a time."""
    rows, n = size
    lanes = min(block, WARPS * 32 * 16 // x.element_size())  # 16 bytes a thread
    resident = _resident(x.device)
    programs = min(triton.cdiv(n, block), max(resident // rows, 1), PROGRAMS)
    groups = min(rows, resident // programs)
    kind = {"PROGRAMS": PROGRAMS, "UNROLL": block // lanes, "LANES": lanes, "POLLS": POLLS}
    return _Shared(
        programs,
        groups,
        x.new_empty((groups, 2, sums, programs), dtype=torch.float32),
        x.new_zeros(groups, dtype=torch.int32),
        kind | {"num_warps": WARPS, "maxnreg": MAXNREG, "launch_cooperative_grid": True},
    )


@functools.cache
def _resident(where: torch.device) -> int:
    """How many programs of a cooperative launch a device holds; in the interpreter, one runs after another."""
    if where.type != "cuda":
        return 1
    return RESIDENT * int(torch.cuda.get_device_properties(where).multi_processor_count)


def _tile(n: int, most: int) -> tuple[int, int]:
    """Rows that a program has, and elements of each, for rows of n: many short ones, or a part of a long one."""
    block = min(max(triton.next_power_of_2(n), 16), most)
    return max(HELD // block, 1), block


def _warps(elements: int) -> int:
    return next(warps for held, warps in REGISTERS.items() if elements <= held)
