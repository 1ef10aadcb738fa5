"""The operations on a CUDA device, in Triton, for float32, bfloat16 and float16. Nothing waits for the device.

| operation                            | launches                        | reads of x                         |
|--------------------------------------|---------------------------------|------------------------------------|
| a step, or a solution, of short rows | 1                               | 1                                  |
| the same of long rows                | 2: one zeroes counters           | one an iteration, and one to round |
| `remember`                           | 1                               |                                    |
| `fake_quantize`, its gradient        | 1 each                          | 1                                  |
| `orient`                             | 2                               | 1                                  |

A row that fits into registers is read once, and solved to convergence by one program, which holds many rows where they
are short. A longer row, such as an activation, is shared by as many programs as the device holds at once; they are
launched cooperatively, so that all of them are there, and meet after each read. The alternative, a launch an iteration,
must issue as many as an iteration may take, whether or not the row has converged.

A meeting that does not come about ends after some seconds, with NaN for s, since no program can end a launch: a run
then stops at its loss, instead of keeping the device forever. The counters of meetings are fresh
memory in each call: kept ones would be shared by streams, and by CUDA graphs and what runs beside them.

All launches depend on shapes alone, so a CUDA graph can hold them. Other dtypes, devices and granularities are left to
`eager`.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor, nn

from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import eager, remembered
from qat_runner.quant.kernels import triton_kernels as device
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.kernels.views import beside, dense, extent, floats
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import kept

SERVED = (torch.float32, torch.bfloat16, torch.float16)
REGISTERS = {1024: 4, 4096: 8, 16384: 16}
"""Elements that one program holds, and its number of warps."""
BLOCK = 4096
"""Elements of a long row, in float32, that a program loads at a time: 16 KB."""
PROGRAMS = 512
"""Programs that share the reading of a long row, at most; a power of two."""
WARPS = 8
"""Of a program that reads a part of a long row."""
RESIDENT = 2
"""Such programs on a multiprocessor. With MAXNREG registers a thread that many fit, as they must to meet."""
MAXNREG = 128
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


octav_interval = eager.octav_interval


def octav_and_quantize(
    x: Tensor, cost: Cost, format: IntFormat, search: Search, state: Remembered, warm: bool
) -> tuple[Tensor, Tensor]:
    """As `eager.octav_and_quantize`; in the launches of a solution."""
    where = dense(x)
    size = extent(where, state.s) if _serves(x) and search.pool is None and _holds(state, x) else None
    if size is None:
        return eager.octav_and_quantize(x, cost, format, search, state, warm)
    s, out = torch.empty_like(state.s), torch.empty_like(where)
    _solve(where, size, state.s if warm and state.known else None, s, cost, search, (format, state, out))
    _written(state)
    return s, out


def remember(s: Tensor, state: Remembered) -> None:
    """As `remembered.remember`; one launch."""
    if not (_serves(s) and _holds(state, s)):
        remembered.remember(s, state)
        return
    s, block = floats(s), min(REGISTERS)
    with _on(s):
        device.remember[(triton.cdiv(s.numel(), block),)](
            s, state.s, state.running_s, state.batches, s.numel(), state.weight, BLOCK=block
        )
    _written(state)


def _holds(state: Remembered, x: Tensor) -> bool:
    """Whether kernels can write to a state."""
    scalars = state.s, state.running_s
    dense = all(t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device for t in scalars)
    return dense and state.batches.device == x.device and state.s.numel() > 0


def _written(state: Remembered) -> None:
    """Tell autograd, and whoever asks for versions, what kernels wrote to."""
    written = [t for t in (state.s, state.running_s, state.batches) if not t.is_inference()]
    torch.autograd.graph.increment_version(written)


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
    resolution = format.resolution if isinstance(format, IntFormat) else format.levels_per_scalar
    levels = format.levels_per_scalar, resolution, format.lowest, format.highest
    out = torch.empty_like(where)
    _in_tiles(
        device.fake_quantize,
        (where, floats(s), out),
        size,
        *map(float, levels),
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
    levels: tuple[float, ...] = (1.0, 1.0, 0.0, 0.0)
    if format is not None:
        levels = tuple(map(float, (format.levels_per_scalar, format.resolution, format.lowest, format.highest)))
    kind = {
        "SIGNED": cost.signed,
        "SIDED": cost.sided,
        "POINTED": short is not None,
        "COLD": guess is None,
        "STEP": step is not None,
    }
    launch = _solve_short if size[1] <= max(REGISTERS) else _solve_long
    with _on(x):
        launch(size, pointers, (*numbers, *levels), kind)


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
    (rows, n), x = size, pointers[0]
    block = BLOCK * 4 // x.element_size()
    lanes = min(block, WARPS * 32 * 16 // x.element_size())  # 16 bytes a thread
    resident = _resident(x.device)
    programs = min(triton.cdiv(n, block), max(resident // rows, 1), PROGRAMS)
    groups = min(rows, resident // programs)
    parts = x.new_empty((groups, 2, device.SUMS.value, programs), dtype=torch.float32)
    arrived = x.new_zeros(groups, dtype=torch.int32)
    device.solve_long[(groups * programs,)](
        *pointers,
        parts,
        arrived,
        rows,
        n,
        programs,
        groups,
        *numbers,
        **kind,
        PROGRAMS=PROGRAMS,
        UNROLL=block // lanes,
        LANES=lanes,
        POLLS=POLLS,
        num_warps=WARPS,
        maxnreg=MAXNREG,
        launch_cooperative_grid=True,
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
    return max(min(REGISTERS) // block, 1), block


def _warps(elements: int) -> int:
    return next(warps for held, warps in REGISTERS.items() if elements <= held)
