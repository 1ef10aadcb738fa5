"""Measure the cost of quantization, as ratios within one run.

    python scripts/benchmark.py                         # all parts except gpu, saved in bench/
    python scripts/benchmark.py solver step --rounds 5  # some of the parts
    python scripts/benchmark.py solver --backend eager
    python scripts/benchmark.py gpu                     # all GPU measurements, saved in bench/gpu

The contestants of a comparison take turns, round by round, so that a busy machine slows down all of them. The tables
show medians and, as the spread, the distance between the quartiles. Parts:

    solver     OCTAV, cold and warm, compared with the textbook iteration, the MSE sweep, PyTorch's fake-quantize and a
               copy
    growth     OCTAV for different numbers of elements, rows and bits
    select     percentiles of |x| compared with NumPy's, for a thousand to a hundred million elements
    step       a whole training step: full precision, static scalars, max-scaling, OCTAV
    grids      a whole training step with OCTAV in each integer range, refined, and with affine activations
    learned    a whole training step with learned scalars, those of LSQ and PACT, compared with OCTAV
    processes  a whole training step of two processes with one thread each
    memory     peak memory of the same steps
    startup    seconds until the end of the first step, with an empty and with a warm compilation cache
    gpu        only on request, ten minutes on a CUDA device: the bandwidth of each kernel; training steps, eager, as
               CUDA graphs and with torch.compile, with kernel launches, host waits and peak memory. These do not take
               turns, so that each measurement has the device and its memory for itself
    images     CPU time of decoding and augmenting JPEGs in every layout, compared with the loaders of torchvision and
               timm
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmark_gpu import NETWORKS, WAYS, gpu
from benchmark_images import images
from contests import GRIDS, LEARNED, MODES, Contest, make_step, most_allocated, take_turns
from tabulate import tabulate
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from qat_runner.quant import IntFormat, fake_quantize, mse_sweep, octav, percentile
from qat_runner.quant.kernels import set_backend
from qat_runner.runs.environment import environment
from qat_runner.training.memory import keep_freed_memory

STEPS = {  # name: (model, image size or number of tokens, batch size)
    "resnet18 32x32 b128": ("resnet18", 32, 128),
    "resnet20 32x32 b128": ("resnet20", 32, 128),
    "mobilenet_v2 64x64 b64": ("mobilenet_v2", 64, 64),
    "resnet50 224x224 b8": ("resnet50", 224, 8),
    "minilm 384 tokens b4": ("minilm", 384, 4),
    "bert_base 384 tokens b4": ("bert_base", 384, 4),
    "vit_tiny 64x64 b2": ("timm/vit_tiny_patch16_224", 64, 2),
    "vit_tiny 224x224 b8": ("timm/vit_tiny_patch16_224", 224, 8),
    "swin_tiny 224x224 b4": ("timm/swin_tiny_patch4_window7_224", 224, 4),
    "convnext_atto 64x64 b2": ("timm/convnext_atto", 64, 2),
    "convnext_atto 224x224 b8": ("timm/convnext_atto", 224, 8),
}
PAIRED = {"resnet18 32x32 2 x b64": ("resnet18", 32, 64)}
"""Training steps of two processes together; the batch size is that of each process."""


def textbook(x: Tensor, bits: int, signed: bool, dim: int | None) -> Tensor:
    """Run ten iterations of Corollary 3.2, written as in the paper."""
    dims = tuple(d for d in range(x.ndim) if dim is None or d != dim)
    k = 4.0**-bits / (3 if signed else 12)
    s = x.abs().sum(dims, keepdim=True) / (x != 0).sum(dims, keepdim=True)
    for _ in range(10):
        outside = x.abs() > s
        inside = (x != 0) & ~outside
        s = (x.abs() * outside).sum(dims, keepdim=True) / (
            k * inside.sum(dims, keepdim=True) + outside.sum(dims, keepdim=True)
        )
    return s


def others(x: Tensor, dim: int | None) -> Contest:
    """Return the equivalents of other tools, if they are installed (pip install '.[bench]')."""
    contest: Contest = {}
    if importlib.util.find_spec("ai_edge_quantizer"):
        from ai_edge_quantizer.algorithms.uniform_quantize.octav import _guess_clipping_with_octav as edge

        axes = None if dim is None else tuple(d for d in range(x.ndim) if d != dim)
        contest["ai-edge-quantizer octav"] = partial(edge, x.numpy(), 4, axes, 10, 3.0)
    if importlib.util.find_spec("brevitas") and dim == 0:
        contest["brevitas mse search"] = partial(brevitas_search, x)
    return contest


def brevitas_search(weight: Tensor) -> object:
    """Run Brevitas' MSE search, which happens when a weight [K, C] is first quantized."""
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    layer = QuantLinear(
        weight.shape[1], weight.shape[0], bias=False, weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=4
    )
    layer.weight.data.copy_(weight)
    return layer.quant_weight()


def solver(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    tensors: list[tuple[str, Tensor, bool, int | None]] = [
        ("weights [512, 4608], per row", torch.randn(512, 4608), True, 0)
    ]
    for n in (0.1, 1.0, 8.4, 33.0):
        x = torch.randn(int(n * 1e6))
        tensors += [(f"{n:g} M, signed", x, True, None), (f"{n:g} M, unsigned", x.relu(), False, None)]
    rows: list[dict[str, Any]] = []
    for name, x, signed, dim in tensors:
        x, format = x.to(device), IntFormat(4, signed)
        s = octav(x, format, dim, check=False)
        contest: Contest = {
            "copy": x.clone,
            "octav cold": partial(octav, x, format, dim, check=False),
            "octav warm, 2 reads": partial(octav, x, format, dim, 2, s * 1.03, check=False),
            "octav warm, 1 read": partial(octav, x, format, dim, 1, s * 1.03, check=False),
            "our fake-quantize": partial(fake_quantize, x, s, format),
            "torch fake-quantize": partial(torch.fake_quantize_per_tensor_affine, x, 0.1, 0, -8, 7),
            "textbook octav": partial(textbook, x, 4, signed, dim),
        }
        if x.numel() < 2e7:
            contest["mse sweep, 100 points"] = partial(mse_sweep, x, format, dim, check=False)
        if device.type == "cpu" and signed:
            contest |= others(x, dim)
        for contestant, figures in take_turns(contest, args.rounds, device).items():
            rows.append({"tensor": name, "what": contestant, **figures})
        copy, book = (
            next(r["ms"] for r in rows if r["tensor"] == name and r["what"] == w) for w in ("copy", "textbook octav")
        )
        for row in rows:
            if row["tensor"] == name:
                row |= {"x copy": row["ms"] / copy, "speedup over textbook": book / row["ms"]}
    return rows


def growth(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    contest: Contest = {}
    for n in (10_000, 100_000, 1_000_000, 10_000_000):
        contest[f"{n} elements"] = partial(octav, torch.randn(n, device=device), 4, check=False)
    for rows in (1, 64, 4096):
        x = torch.randn(rows, 2**20 // rows, device=device)
        contest[f"1 M in {rows} rows"] = partial(octav, x, 4, dim=0, check=False)
    for bits in (2, 4, 6, 8):
        contest[f"1 M, {bits} bits"] = partial(octav, torch.randn(2**20, device=device), bits, check=False)
    return [{"what": name, **figures} for name, figures in take_turns(contest, args.rounds, device).items()]


def numpys_percentile(x: np.ndarray, q: float) -> object:
    return np.percentile(np.abs(x), q)


def select(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for n in (10**e for e in range(3, 9)):
        x = torch.randn(n)
        there, array = x.to(device), x.numpy()
        for q in (0.1, 1, 50, 90, 99, 99.9, 99.99, 99.999, 100):
            contest: Contest = {
                "ours": partial(percentile, there, 4, q=q, check=device.type == "cpu"),
                "NumPy": partial(numpys_percentile, array, q),
            }
            figures = take_turns(contest, args.rounds if n < 1e7 else 3, device)
            ours, numpy = figures["ours"]["ms"], figures["NumPy"]["ms"]
            rows.append({"elements": n, "q": q, "ours, ms": ours, "NumPy, ms": numpy, "ours / NumPy": ours / numpy})
    return rows


def step(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name, which in chosen_steps(args, device).items():
        rivals = ("brevitas",) if importlib.util.find_spec("brevitas") and which[0] == "resnet18" else ()
        contest = {mode: make_step(which, mode, device, amp=device.type == "cuda") for mode in MODES + rivals}
        figures = take_turns(contest, args.rounds, device)
        for mode, f in figures.items():
            against = {f"x {other}": f["ms"] / figures[other]["ms"] for other in ("full precision", "static")}
            rows.append({"network": name, "what": mode, **f, **against})
    return rows


def grids(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    return _steps_beside("two's complement", [*GRIDS], args, device)


def learned(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    return _steps_beside("full precision", LEARNED, args, device)


def _steps_beside(
    first: str, modes: Sequence[str], args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Measure steps of networks in several modes, each also as a multiple of the time of the mode `first`."""
    rows = []
    for name, which in chosen_steps(args, device).items():
        contest = {mode: make_step(which, mode, device, amp=device.type == "cuda") for mode in modes}
        figures = take_turns(contest, args.rounds, device, beside=first)
        rows += [{"network": name, "what": mode, **f} for mode, f in figures.items()]
    return rows


def processes(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure steps of two processes on a CPU with one thread each, using DistributedDataParallel."""
    rows: list[dict[str, Any]] = []
    for name in PAIRED:
        with tempfile.TemporaryDirectory() as scratch:
            spawn(_take_turns_together, (name, args, scratch), nprocs=2)
            figures = json.loads(Path(scratch, "figures.json").read_text())
        rows += [{"network": name, "what": mode, **f} for mode, f in figures.items()]
    return rows


def _take_turns_together(rank: int, name: str, args: argparse.Namespace, scratch: str) -> None:
    torch.set_num_threads(1)
    set_backend(args.backend)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=2)
    contest = {mode: make_step(PAIRED[name], mode, torch.device("cpu"), amp=False) for mode in MODES}
    figures = take_turns(contest, args.rounds, torch.device("cpu"), beside="full precision")
    if rank == 0:
        Path(scratch, "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def chosen_steps(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[str, int, int]]:
    steps = NETWORKS if device.type == "cuda" else STEPS
    return {name: which for name, which in steps.items() if args.only in name}


def memory(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure the peak memory of each step, in its own process: of tensors, and of the process as the OS sees it."""
    rows: list[dict[str, Any]] = []
    for name in chosen_steps(args, device):
        for mode in MODES:
            command = [sys.executable, __file__, "--peak", name, mode, "--backend", args.backend]
            command += ["--device", args.device, "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            tensors, process = map(float, done.stdout.split()[-2:])
            rows.append({"network": name, "what": mode, "tensors, MiB": tensors, "process, MiB": process})
            full = next(r for r in rows if r["network"] == name and r["what"] == "full precision")
            rows[-1] |= {f"{of} x": rows[-1][f"{of}, MiB"] / full[f"{of}, MiB"] for of in ("tensors", "process")}
    return rows


def peak(name: str, mode: str, device: torch.device) -> tuple[float, float]:
    """Return the peak MiB of tensors, and of the process without the memory of Python and PyTorch themselves."""
    make_step(("resnet20", 32, 2), "octav", device, amp=False)()
    before = resident_peak()
    run = make_step((STEPS | NETWORKS)[name], mode, device, amp=device.type == "cuda")
    for _ in range(3):
        run()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, torch.cuda.max_memory_reserved(device) / 2**20
    process = resident_peak() - before
    return most_allocated(run) / 2**20, process


def resident_peak() -> float:
    """Return the peak resident memory in MiB. Not from getrusage, whose value is inherited from the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**10


def startup(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time qat-run with one training step, started as a user would start it."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for label, backend in (("eager", "eager"), ("auto cold", "auto"), ("auto cached", "auto")):
            command = [
                sys.executable,
                "-m",
                "qat_runner",
                f"backend={backend}",
                f"run_dir={scratch}/{label.replace(' ', '_')}",
            ]
            command += ["epochs=1", "limit_train_batches=1", "limit_val_batches=1", "noise_batches=0"]
            command += [f"device={device}"]
            began = time.perf_counter()
            cache = {"QAT_CACHE_DIR": f"{scratch}/cache", "TRITON_CACHE_DIR": f"{scratch}/cache"}
            cache |= {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
            subprocess.run(command, env=os.environ | cache, capture_output=True, check=True)
            rows.append({"what": label, "seconds": time.perf_counter() - began})
            rows[-1]["over eager"] = rows[-1]["seconds"] - rows[0]["seconds"]
    return rows


PARTS = {
    each.__name__: each for each in (solver, growth, select, step, grids, learned, processes, memory, startup, images)
}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help=f"any of {', '.join(PARTS)} (default: all), or gpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", default="auto", help="auto, eager, compiled or triton")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="number of PyTorch threads on a CPU"
    )
    parser.add_argument("--plain-malloc", action="store_true", help="let malloc return freed memory to the system")
    parser.add_argument("--only", default="", help="measure only networks whose name contains this")
    parser.add_argument(
        "--out", type=Path, help="folder for results.json and results.md (default: bench, or bench/gpu)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="for gpu: small networks and tensors, to check that it works"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="for gpu: how steps are run (default: all)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9, help="for gpu: skip the remaining rows after this many minutes"
    )
    parser.add_argument("--peak", nargs=2, metavar=("NETWORK", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    unknown = [part for part in args.parts if part not in (*PARTS, "gpu")]
    if unknown:
        parser.error(f"{unknown[0]!r}: there is no such part; the parts are {', '.join(PARTS)}, gpu")
    if "gpu" in args.parts and len(args.parts) > 1:
        parser.error("gpu: cannot be combined with other parts")
    if "gpu" in args.parts and torch.device(args.device).type != "cuda" and not args.tiny:
        parser.error("gpu: needs a CUDA device; to check that it works without one, pass gpu --device cpu --tiny")
    args.out = args.out or Path("bench", *args.parts[:1] if "gpu" in args.parts else ())
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backend = set_backend(args.backend, device.type)
    if not args.plain_malloc:
        keep_freed_memory()  # as qat-run does
    if args.peak:
        name, mode = args.peak
        print(*peak(name, mode, device))
        return
    machine = environment()["machine"] | {"torch": torch.__version__, "python": platform.python_version()}
    results: dict[str, Any] = {"machine": machine, "backend": backend, "rounds": args.rounds}
    text = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['gpus'] or 'no GPU'}, torch {torch.__version__}"
    ]
    text += [f"backend {backend}, {args.rounds} rounds"]
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        tables = gpu(args, device) if part == "gpu" else {part: PARTS[part](args, device)}
        for title, rows in tables.items():
            results[title] = rows
            table = tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g")
            print(f"\n{title}\n{table}", flush=True)
            text += [f"## {title}", table]
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (args.out / "results.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
