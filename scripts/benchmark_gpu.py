"""The part `gpu` of benchmark.py: how close the kernels come to the memory bandwidth, and what training steps cost.

On a CPU, with --tiny, the same code runs tiny measurements to check that it works.
"""

import argparse
import gc
import math
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from contests import Contest, make_step, most_allocated, synchronize, take_turns
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat_runner.quant import IntAffineFormat, IntFormat, octav
from qat_runner.quant.kernels import backend, using
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered

Row = dict[str, Any]

NETWORKS = {
    "resnet50 224x224 b64": ("resnet50", 224, 64),
    "resnet50 224x224 b256": ("resnet50", 224, 256),
    "mobilenet_v2 224x224 b256": ("mobilenet_v2", 224, 256),
    "vit_s 224x224 b256": ("vit_s", 224, 256),
    "bert_base 384 tokens b32": ("bert_base", 384, 32),
}
TINY_NETWORKS = {
    "resnet20 8x8 b2": ("resnet20", 8, 2),
    "vit_tiny 8x8 b2": ("vit_tiny", 8, 2),
    "bert_tiny 8 tokens b2": ("bert_tiny", 8, 2),
}
MODES = ("full precision", "static", "octav")
WAYS = ("eager", "CUDA graph", "torch.compile")
"""The ways to run a step, in this order, so that the slowest ones are skipped first when time runs out."""
BUSY_MS = 10
"""Duration of the repeated calls for one timing of a kernel; each call costs the host tens of microseconds."""
ROW_SECONDS = 60
"""Time limit of a row, because torch.compile can take arbitrarily long."""


class TookTooLongError(Exception):
    """A row exceeded its time limit."""


def gpu(args: argparse.Namespace, device: torch.device) -> dict[str, list[Row]]:
    """Return both tables within about `args.minutes`; the row of a failed or skipped measurement has the reason."""
    end = time.monotonic() + 60 * args.minutes
    return {"kernels": kernels(args, device), "training steps": steps(args, device, end)}


def kernels(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure each operation of the device's backend, compared with a copy on the device, which reads and writes."""
    table: list[Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, dim in shapes(device, args.tiny):
            x = torch.randn(shape, device=device, dtype=dtype)
            table += kernel_rows(x, dim, args.rounds, device)
            del x
            free(device)
    return table


def shapes(device: torch.device, tiny: bool) -> list[tuple[tuple[int, ...], int | None]]:
    """Return one row, rows that fit into one program, and longer rows; a copy of each takes longer than its call."""
    if tiny:
        return [((3000,), None), ((8, 64), 0)]
    roomy = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 40e9
    n = 2**28 if roomy else 2**26
    return [((n,), None), ((n // 4096, 4096), 0), ((n // 32768, 32768), 0)]


def kernel_rows(x: Tensor, dim: int | None, rounds: int, device: torch.device) -> list[Row]:
    """Measure the operations on a tensor, per tensor or per row."""
    what = {
        "tensor": f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}, per {'tensor' if dim is None else 'row'}"
    }
    table: list[Row] = []
    copy = None
    for name, (passes, run) in operations(x, dim).items():
        row: Row = what | {"kernel": name}
        try:
            with at_most(ROW_SECONDS):
                row |= timed(run, rounds, device)
        except Exception as error:
            table.append(row | {"error": first_line(error)})
            continue
        copy = copy or row["ms"]
        if passes:
            row["GB/s"] = passes * x.nbytes / row["ms"] / 1e6
        row["x copy"] = row["ms"] / copy
        if passes:  # a copy reads once and writes once
            row["of a copy's bandwidth"] = passes / 2 / row["x copy"]
        table.append(row)
    return table


def timed(run: Callable[[], object], rounds: int, device: torch.device) -> Row:
    """Measure milliseconds per call; on a GPU, in a sequence of calls by the device's clock, and of a single call."""
    alone: Row = take_turns({"": run}, rounds, device)[""]
    if device.type != "cuda":
        return alone
    times: list[float] = []
    calls = math.ceil(BUSY_MS / alone["ms"])
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(calls):
            run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / calls)
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "spread": high - low, "ms alone": alone["ms"]}


def operations(x: Tensor, dim: int | None) -> dict[str, tuple[int | None, Callable[[], object]]]:
    """Return name -> (number of passes, function to run).

    The passes are the minimum number of reads and writes of x, or of tensors of its size; None if it depends on the
    values.
    """
    ours, format = backend(x), IntFormat(4)
    dims = tuple(d for d in range(x.ndim) if d != dim)
    cost, out, grad = Cost(format.rounding_noise, True), torch.empty_like(x), torch.randn_like(x)
    with using("eager", x.device.type):
        s = octav(x, format, dim, check=False)
    state = Remembered(s.clone(), s.clone(), torch.zeros((), dtype=torch.int64, device=x.device), 0.1, True)
    once, fully = Search(dims, 1, 0.0), Search(dims, 20, 1e-4)
    factors = (0.9, 1.0, 1.1)
    held = dim is not None and x[0].numel() <= max(
        getattr(ours, "REGISTERS", [0])
    )  # then one read serves both solving and rounding
    return {
        "copy": (2, partial(out.copy_, x)),
        "octav, cold": (None, partial(ours.octav, x, cost, None, fully)),
        "octav, one warm iteration": (1, partial(ours.octav, x, cost, s * 1.03, once)),
        "octav_and_quantize, one warm iteration": (
            2 if held else 3,
            partial(ours.octav_and_quantize, x, cost, format, once, state, True),
        ),
        "octav_interval, one warm iteration": (
            1,
            partial(ours.octav_interval, x, IntAffineFormat(4).rounding_noise, torch.stack([-s, s]), once),
        ),
        "remember": (None, partial(ours.remember, s, state)),
        "orient": (1, partial(ours.orient, x, s, None, 0.5, 0.0)),
        "refine, 3 factors": (3, partial(ours.refine, x, s, format, factors)),
        "fake_quantize": (2, partial(ours.fake_quantize, x, s, format)),
        "fake_quantize_backward, pwl": (3, partial(ours.fake_quantize_backward, grad, x, s, format, "pwl")),
        "learned_backward": (3, partial(ours.learned_backward, grad, x, s, format, True)),
        "fake_quantize_backward, mad": (3, partial(ours.fake_quantize_backward, grad, x, s, format, "mad")),
    }


def steps(args: argparse.Namespace, device: torch.device, end: float) -> list[Row]:
    """Measure training steps one after another, because not all fit into memory together.

    Args:
        end: the time, by time.monotonic(), after which rows are skipped.
    """
    networks = TINY_NETWORKS if args.tiny else NETWORKS
    table: list[Row] = []
    for way in args.ways:
        for name, which in networks.items():
            for mode in MODES if args.only in name else ():
                row = {"network": name, "way": way, "what": mode}
                left = end - time.monotonic()
                if left <= 0:
                    table.append(row | {"error": f"skipped: the {args.minutes:g} minutes are used up"})
                    continue
                try:
                    with at_most(min(left, ROW_SECONDS)):
                        row |= figures_of_step(which, mode, way, args, device)
                except Exception as error:
                    row["error"] = first_line(error)
                free(device)
                table.append(row | beside_full_precision(row, table))
    return table


def beside_full_precision(row: Row, before: list[Row]) -> Row:
    """Return the time relative to full precision, run in the same way, if both are known."""
    same = ("network", "way")
    full = next((r for r in [*before, row] if all(r[k] == row[k] for k in same) and r["what"] == MODES[0]), {})
    return {"x full precision": row["ms"] / full["ms"]} if "ms" in row and "ms" in full else {}


def figures_of_step(
    which: tuple[str, int, int], mode: str, way: str, args: argparse.Namespace, device: torch.device
) -> Row:
    """Measure the time, launches, waits and peak memory of a training step."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    torch.compiler.reset()
    compiler = partial(torch.compile, backend="aot_eager" if args.tiny else "inductor")
    wrap = {"wrap": compiler} if way == "torch.compile" else {}
    # During capture, weights are solved one by one; earlier steps must have loaded the kernels for this.
    step = make_step(which, mode, device, amp=cuda, together=way != "CUDA graph", **wrap)
    if way == "CUDA graph":
        step = captured(step, device)
    contest: Contest = {way: step}
    row: Row = take_turns(contest, args.rounds, device)[way]
    launches, waits = launches_and_waits_on_gpu(step, device) if cuda else calls_and_reads(step)
    peak = torch.cuda.max_memory_allocated(device) if cuda else most_allocated(step)
    return row | {"launches": launches, "waits": waits, "peak, MiB": peak / 2**20}


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture a step as one CUDA graph, after the warm-up that capture requires."""
    if device.type != "cuda":
        raise RuntimeError("a CUDA graph needs a CUDA device")
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph),
    ):  # restores the stream even if capture fails
        step()
    return graph.replay


def launches_and_waits_on_gpu(step: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Count the kernels that the device runs in a step, and how often the host waits for the device meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize(device)
    on_device = [e for e in profile.events() or [] if e.device_type.name == "CUDA"]
    kernels = [e for e in on_device if not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset"))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(kernels), sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def calls_and_reads(step: Callable[[], object]) -> tuple[int, int]:
    """Count, on a CPU, the calls of PyTorch's dispatcher in a step, and how many of them read a value."""
    with Calls() as calls:
        step()
    return len(calls.names), calls.names.count("aten._local_scalar_dense.default")


class Calls(TorchDispatchMode):
    """Records the names of operations inside the context; what a kernel does internally is not visible."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError inside the context if it takes longer."""

    def over(signum: int, frame: object) -> None:
        raise TookTooLongError(f"took longer than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: Exception) -> str:
    """Return the first line of an error message, and the second one if the first only introduces it."""
    lines = str(error).strip().splitlines() or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"


def free(device: torch.device) -> None:
    """Release the memory of finished measurements before the next one allocates."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
