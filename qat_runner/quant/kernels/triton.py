"""The operations on a CUDA device, in Triton, for float32, bfloat16 and float16. The host never waits for the device.

| operation                               | launches                         | reads of x                             |
|-----------------------------------------|----------------------------------|----------------------------------------|
| a training step or a solve, short rows  | 1                                | 1                                      |
| the same, long rows                     | 2: one zeroes the counters       | one per iteration, and one to round    |
| a solve for two clipping bounds         | 1, or 2 for long rows            | 1, or one per iteration                |
| training steps of many tensors          | one per tile size, 2 for long    | as above                               |
| their gradients                         | 1, and copies                    | 1                                      |
| `remember`                              | 1                                |                                        |
| `fake_quantize`, its gradient           | 1 each                           | 1                                      |
| `learned_backward`                      | 2: one adds the programs' sums   | 1                                      |
| `orient`                                | 2                                | 1                                      |

A row that fits into registers is read once and solved to convergence by one program; if rows are short, one program
holds many of them. A longer row, such as an activation, is shared by as many programs as the device holds at once. They
are launched cooperatively, so that all of them are resident, and synchronize at a barrier after each read. The
alternative, one launch per iteration, would have to issue the largest allowed number of launches, whether or not the
row has converged.

A barrier that not all programs reach gives up after some seconds, with NaN for s, because no program can end a launch:
the run then stops because of its loss instead of occupying the device forever. The counters of the barriers are newly
allocated in each call: persistent ones would be shared between streams, and between CUDA graphs and whatever runs
beside them.

Several tensors are passed as a table of addresses on the device. The table is kept for as long as the tensors keep
their addresses, as the weights of a network do from step to step.

All launches depend only on shapes, so a CUDA graph can contain them. While a graph is captured, several tensors are
solved one by one. The kernels for this must have been called before, because none can be loaded during capture.

Other dtypes, devices and granularities are left to `eager`.
"""

import functools
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
from qat_runner.quant.kernels.intervals import furthest
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.kernels.views import dense, floats, in_layout_of, rows_and_length
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import scalar_shape

CALLS_COST = True  # see eager
SERVED = (torch.float32, torch.bfloat16, torch.float16)
REGISTERS = {1024: 4, 4096: 8, 16384: 16}
"""Number of elements that one program holds -> its number of warps."""
HELD = 512
"""Elements that a program holds of several short rows; with twice as many, its values per row spill to memory."""
BLOCK = 4096
"""Elements of a long row that a program loads at a time, in float32: 16 KB."""
PROGRAMS = 512
"""The largest number of programs that share the reads of a long row; a power of two."""
WARPS = 8
"""Warps of a program that reads a part of a long row."""
RESIDENT = 2
"""Such programs per multiprocessor. With MAXNREG registers per thread they all fit, as the barriers require."""
MAXNREG = 128
SIZES = (64, 1024, 4096, 8192, 16384)
"""Row-length classes for short rows of several tensors: the rows of each class, up to that length, share a launch."""
ALIGNED = 16
"""Alignment, in elements, of tensors stored one after another."""
POLLS = 1 << 22
"""How often a program polls whether the others have reached the barrier before it gives up; about 1 us per poll."""


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav`; each row stops as soon as it has converged."""
    where, s = dense(x), x.new_empty(scalar_shape(x, search.dims), dtype=torch.float32)
    size = rows_and_length(where, s) if _serves(x) and search.pool is None else None
    if size is None:
        return eager.octav(x, cost, guess, search)
    _solve(where, size, None if guess is None else floats(guess.expand(s.shape)), s, cost, search)
    return s


def octav_interval(x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav_interval`; each row stops as soon as it has converged."""
    where, ends = dense(x), x.new_empty((2, *scalar_shape(x, search.dims)), dtype=torch.float32)
    size = rows_and_length(where, ends, 2) if _serves(x) and search.pool is None else None
    if size is None:
        return eager.octav_interval(x, noise, guess, search)
    start = ends if guess is None else floats(guess.expand(ends.shape))
    numbers = noise, furthest(noise), search.tolerance, search.iterations
    rows, n = size
    with _on(x):
        if n <= (most := max(REGISTERS) // 2):  # with max(REGISTERS) elements, a program's values would spill
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
    """As `eager.octav_and_quantize`, in the same launches as a solve alone."""
    where = dense(x)
    size = rows_and_length(where, state.s) if _serves(x) and search.pool is None and state.holds(x.device) else None
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
    """As `eager.octav_and_quantize_all`; the number of launches depends on row sizes, not on the number of tensors."""
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
    size = rows_and_length(where, s) if _serves(x) and pool is None else None
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
    """Call `eager.refine`: it is used for rows of few elements, in a small part of a network."""
    return eager.refine(x, s, format, factors)


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`; one read and one write."""
    where = dense(x)
    size = rows_and_length(where, s, format.parts) if _serves(x) else None
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
    size = rows_and_length(where, s, format.parts) if _serves(x) else None
    if size is None:
        return eager.fake_quantize_backward(grad, x, s, format, gradient)
    out = torch.empty_like(where, dtype=grad.dtype)
    _in_tiles(
        device.fake_quantize_backward,
        (in_layout_of(grad, where), where, floats(s), out),
        size,
        SIGNED=format.signed,
        ENDS=format.parts == 2,
        MAD=gradient == "mad",
    )
    return out


def fake_quantize_backward_all(
    grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat, gradient: str
) -> list[Tensor]:
    """As `eager.fake_quantize_backward_all`; one launch, and the copies that place the gradients side by side."""
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
    """As `eager.learned_backward`; two reads and one write, and a final sum over the partial sums of the programs."""
    where = dense(x)
    size = rows_and_length(where, s, format.parts) if _serves(x) else None
    if size is None:
        return eager.learned_backward(grad, x, s, format, rounding)
    rows, n = size
    blocks = triton.cdiv(n, _tile(n, BLOCK)[1])
    out = torch.empty_like(where, dtype=grad.dtype)
    sums = x.new_empty((format.parts, blocks, rows), dtype=torch.float32)
    _in_tiles(
        device.learned_backward,
        (in_layout_of(grad, where), where, floats(s), out, sums),
        size,
        *_levels(format),
        SIGNED=format.signed,
        AFFINE=format.parts == 2,
        ROUNDING=rounding,
    )
    return out, sums.sum(1).reshape(s.shape)


def _alike(tensors: Sequence[Tensor], states: Sequence[Remembered] = ()) -> bool:
    """Whether the kernels serve all tensors in the same way and without copies."""
    first = tensors[0]
    return (
        all(_serves(t) and t.dtype == first.dtype and t.device == first.device for t in tensors)
        and all(dense(t) is t for t in tensors)
        and all(state.holds(first.device) for state in states)
    )


@dataclass(frozen=True)
class _Many:
    """Several tensors as the kernels see them: the address of each, and where its results go."""

    table: Tensor
    """see `triton_kernels.FIELDS`"""
    tiles: dict[tuple[int, int], Tensor]
    """by (rows, elements) that a program holds: int64 [programs, 2], each program's tensor and first row"""
    long: Tensor | None
    """a table of the rows that are too long for one program; None: there are none"""
    longest: int
    """elements of the longest of them"""
    pieces: Tensor
    """int64 [programs, 2]: each program's tensor and the first of its BLOCK elements"""
    scalars: int
    """number of scalars of all tensors"""
    elements: int
    """number of elements of all tensors, including padding for alignment"""
    first_scalars: tuple[int, ...]
    first_elements: tuple[int, ...]

    @staticmethod
    def split(whole: Tensor, like: Sequence[Tensor], first: Sequence[int]) -> list[Tensor]:
        """Split a tensor into the shapes and strides of others; not by views, which autograd would follow."""
        memory = whole.untyped_storage()
        return [whole.new_empty(0).set_(memory, at, t.shape, t.stride()) for t, at in zip(like, first, strict=True)]


def _many(xs: Sequence[Tensor], ss: Sequence[Tensor], states: Sequence[Remembered] = ()) -> _Many | None:
    """Describe tensors that have one scalar each, or one per row; None for other granularities."""
    sizes = [rows_and_length(x, s) for x, s in zip(xs, ss, strict=True)]
    if None in sizes or (xs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return None  # a capture would copy the table only at replay, and calls before that would find it unfilled
    places = [(x.data_ptr(), *_addresses(states[i] if states else None)) for i, x in enumerate(xs)]
    return _table(tuple(places), tuple(filter(None, sizes)), xs[0].element_size(), xs[0].device)


def _addresses(state: Remembered | None) -> tuple[int, int, int]:
    return (0, 0, 0) if state is None else tuple(t.data_ptr() for t in state[:3])  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)  # two for each group of weights
def _table(
    places: tuple[tuple[int, ...], ...], sizes: tuple[tuple[int, int], ...], size: int, where: torch.device
) -> _Many:
    """Build the description from addresses, without reading from them, and send it to the device once."""
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
    """Return an int64 table on the device, without waiting for it."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else table


def _in_tiles(kernel: Any, tensors: tuple[Tensor, ...], size: tuple[int, int], *numbers: float, **kind: bool) -> None:
    """Launch a kernel that passes once over rows [rows, n], one tile per program."""
    rows, n = size
    held, block = _tile(n, BLOCK)
    blocks, warps = triton.cdiv(n, block), _warps(held * block)
    with _on(tensors[0]):
        kernel[(triton.cdiv(rows, held) * blocks,)](
            *tensors, rows, n, blocks, *numbers, **kind, ROWS=held, BLOCK=block, num_warps=warps
        )


def _serves(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter)  # subclasses may have no memory of their own, or interpret it differently
    return plain and x.dtype in SERVED and (x.device.type == "cuda" or interpreted())


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as in the tests."""
    return bool(triton.knobs.runtime.interpret)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one inside the context; kernels are launched on the current device."""
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
    """Solve for the scalars of the rows of x and write them to s.

    Args:
        x: dense.
        size: the number of rows, and the elements of each.
        guess: float32, dense, one per row; None: cold start.
        s: float32, dense, one per row.
        cost: the objective.
        search: stopping criteria, see `Search`.
        step: the format to round to, the state that remembers s, and the output for the rounded rows; None: only solve.
    """
    format, state, out = step or (None, None, None)
    short = floats(cost.short)
    start = state.s if state is not None else guess
    pointers = (
        x,
        s if start is None else start,  # s is a placeholder for pointers that are not read
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
    """Return the numbers that describe a format to the kernels: levels, resolution, lowest and highest code."""
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
    """How programs share the reads of long rows."""

    programs: int
    """programs per row"""
    groups: int
    """groups of so many programs"""
    parts: Tensor
    """the partial sums of each program, float32 [groups, 2, sums, programs]"""
    arrived: Tensor
    """the barrier counter of each group, int32 [groups], zeros"""
    kind: dict[str, int]
    """the options of the launch"""


def _shared(size: tuple[int, int], x: Tensor, sums: int, block: int) -> _Shared:
    """Plan rows [rows, n] of the dtype of x, for a number of sums per read and `block` elements loaded at a time."""
    rows, n = size
    lanes = min(block, WARPS * 32 * 16 // x.element_size())  # 16 bytes per thread
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
    """Return how many programs of a cooperative launch the device holds at once; 1 in the interpreter."""
    if where.type != "cuda":
        return 1
    return RESIDENT * int(torch.cuda.get_device_properties(where).multi_processor_count)


def _tile(n: int, most: int) -> tuple[int, int]:
    """Return (rows, elements per row) of a program's tile for rows of n: many short rows, or a part of a long one."""
    block = min(max(triton.next_power_of_2(n), 16), most)
    return max(HELD // block, 1), block


def _warps(elements: int) -> int:
    return next(warps for held, warps in REGISTERS.items() if elements <= held)
