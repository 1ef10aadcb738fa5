"""The operations on a CPU, each one loop over memory in C++ (compiled.cpp), for float32 and bfloat16.

The machine's own compiler makes a library of it on first use, in about a second; it serves all sizes, and is kept in
the user's cache folder for the next process. Where that fails, a warning says so once, and `eager` takes over, as it
does for other dtypes, devices and granularities.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import eager
from qat_runner.quant.kernels.cost import Cost
from qat_runner.quant.kernels.views import like, rows_beside, rows_of, with_scalars
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import kept

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
TUNING = [["-march=native", "-fopenmp"], ["-fopenmp"], []]
"""Tried in this order: not every compiler has OpenMP."""


def compiler() -> str | None:
    """The path of a C++ compiler of this machine: the environment variable CXX, g++, clang++ or c++."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def available() -> bool:
    """Whether there is something to compile with on this machine."""
    return compiler() is not None


def octav(
    x: Tensor,
    cost: Cost,
    dims: tuple[int, ...],
    guess: Tensor | None,
    iterations: int,
    tolerance: float,
    pool: Pool | None = None,
) -> Tensor:
    """As `eager.octav`. Rows that fit into the processor's cache are read from memory once."""
    rows = rows_of(x, dims)
    library = _library_for(x)
    if rows is None or library is None or pool is not None:
        return eager.octav(x, cost, dims, guess, iterations, tolerance, pool)
    start, short = (None if t is None else t.to(torch.float32).contiguous() for t in (guess, cost.short))
    s = torch.empty(kept(x, dims), dtype=torch.float32)
    library.qat_octav(
        _half(x),
        rows.data_ptr(),
        *rows.shape,
        None if start is None else start.data_ptr(),
        cost.noise,
        cost.signed,
        cost.reach,
        None if short is None else short.data_ptr(),
        iterations,
        tolerance,
        torch.get_num_threads(),
        s.data_ptr(),
    )
    return s


def octav_interval(
    x: Tensor,
    top: Tensor,
    guess: Tensor | None,
    k: float,
    dims: tuple[int, ...],
    iterations: int,
    tolerance: float,
    pool: Pool | None = None,
) -> Tensor:
    """As `eager.octav_interval`. Rows that fit into the processor's cache are read from memory once."""
    rows = rows_of(x, dims)
    library = _library_for(x)
    if rows is None or library is None or pool is not None:
        return eager.octav_interval(x, top, guess, k, dims, iterations, tolerance, pool)
    start = None if guess is None else guess.to(torch.float32).contiguous()
    top = top.to(torch.float32).contiguous()
    ends = torch.empty_like(top)
    library.qat_octav_interval(
        _half(x),
        rows.data_ptr(),
        *rows.shape,
        top.data_ptr(),
        None if start is None else start.data_ptr(),
        k,
        iterations,
        tolerance,
        torch.get_num_threads(),
        ends.data_ptr(),
    )
    return ends


def overhang(x: Tensor, t: Tensor) -> Tensor:
    """As `eager.overhang`; one read."""
    library, flat = _library_for(x), with_scalars(x, t)
    if library is None or flat is None:
        return eager.overhang(x, t)
    rows, ends = flat
    out = torch.empty_like(ends)
    library.qat_overhang(
        _half(x), rows.data_ptr(), ends.data_ptr(), *rows.shape, torch.get_num_threads(), out.data_ptr()
    )
    return out.reshape(t.shape)


def refine(x: Tensor, s: Tensor, format: IntFormat, factors: Sequence[float]) -> Tensor:
    """As `eager.refine`. Rows that fit into the processor's cache are read from memory once."""
    library, flat = _library_for(x), with_scalars(x, s)
    if library is None or flat is None:
        return eager.refine(x, s, format, factors)
    rows, scalars = flat
    out = torch.empty_like(scalars)
    tried = torch.tensor(factors, dtype=torch.float32)
    library.qat_refine(
        _half(x),
        rows.data_ptr(),
        scalars.data_ptr(),
        *rows.shape,
        format.levels_per_scalar,
        format.lowest,
        format.highest,
        tried.data_ptr(),
        len(tried),
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out.reshape(s.shape)


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`; one read and one write."""
    library = _library_for(x)
    flat = with_scalars(x, format.step(s.to(torch.float32)) if isinstance(format, IntAffineFormat) else s)
    if library is None or flat is None or not isinstance(format, IntFormat | IntAffineFormat):
        return eager.fake_quantize(x, s, format)
    rows, scalars = flat
    out = torch.empty_like(rows)
    bounds: tuple[Tensor, ...]
    if isinstance(format, IntFormat):
        units, resolution, bounds = format.full_scale(scalars), format.resolution, ()
    else:
        zero = format.zero_point(s.to(torch.float32)).reshape(-1)
        units, resolution, bounds = scalars, 1, (-zero, format.highest - zero)
    library.qat_fake_quantize(
        _half(x),
        rows.data_ptr(),
        units.data_ptr(),
        *rows.shape,
        resolution,
        format.lowest,
        format.highest,
        *([bound.data_ptr() for bound in bounds] or (None, None)),
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return like(out, x)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`; two reads and one write."""
    if gradient == "ste":
        return grad
    low, high = (None, s) if format.parts == 1 else format.ends(s)
    library, flat = _library_for(x), with_scalars(x, high)
    if library is None or flat is None or grad.dtype != x.dtype:
        return eager.fake_quantize_backward(grad, x, s, format, gradient)
    rows, scalars = flat
    grad_rows = rows_beside(grad, x, rows)
    lows = None if low is None else low.detach().to(torch.float32).reshape(-1).contiguous()
    out = torch.empty_like(rows)
    library.qat_fake_quantize_backward(
        _half(x),
        grad_rows.data_ptr(),
        rows.data_ptr(),
        None if lows is None else lows.data_ptr(),
        scalars.data_ptr(),
        *rows.shape,
        format.signed,
        gradient == "mad",
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return like(out, x)


def _half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _library_for(x: Tensor) -> ctypes.CDLL | None:
    """The library; None where it does not serve the tensor, or does not exist."""
    plain = type(x) in (Tensor, nn.Parameter)  # subclasses need not have memory, or mean something else by it
    served = plain and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return library() if served else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operations; None, and a warning, where compiling fails."""
    try:
        return _declared(ctypes.CDLL(str(_build())))
    except (OSError, RuntimeError, AttributeError) as error:  # the last: a symbol is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"backend=compiled: compiling failed, going on with eager ({reason})", RuntimeWarning, stacklevel=5
        )
        return None


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    pointer, long, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    tensor = (integer, pointer)  # whether it is half-precision, and where it is
    rows = (long, long)
    loaded.qat_octav.argtypes = [*tensor, *rows, pointer, real, integer, real, pointer, integer, real, integer, pointer]
    loaded.qat_refine.argtypes = [*tensor, pointer, *rows, *[integer] * 3, pointer, integer, integer, pointer]
    loaded.qat_overhang.argtypes = [*tensor, pointer, *rows, integer, pointer]
    loaded.qat_fake_quantize.argtypes = [*tensor, pointer, *rows, *[integer] * 3, pointer, pointer, integer, pointer]
    loaded.qat_fake_quantize_backward.argtypes = [*tensor, *[pointer] * 3, *rows, *[integer] * 3, pointer]
    loaded.qat_octav_interval.argtypes = [*tensor, *rows, pointer, pointer, real, integer, real, integer, pointer]
    for name in ("octav_interval", "octav", "overhang", "refine", "fake_quantize", "fake_quantize_backward"):
        function = getattr(loaded, f"qat_{name}")
        function.restype = None
    return loaded


def _build() -> Path:
    """The library's path; compiled unless it is there."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler found")
    path = cache_folder() / f"kernels-{_fingerprint(command)}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        for tuning in TUNING:
            done = subprocess.run(
                [command, *FLAGS, *tuning, str(SOURCE), "-o", str(made)],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
            if done.returncode == 0:
                os.replace(made, path)  # whole or not at all: other processes may be here as well
                return path
    raise RuntimeError(done.stderr or f"{command} failed")


def _fingerprint(command: str) -> str:
    """Of all that decides what the library holds: source, flags, compiler, and the processor it is tuned for."""
    version = subprocess.run([command, "--version"], capture_output=True).stdout
    return hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS, TUNING, version, _processor())).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def cache_folder() -> Path:
    """$QAT_CACHE_DIR, or qat_runner in the user's cache folder; one of this process alone if that cannot be written."""
    base = os.environ.get("QAT_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qat_runner"
    folder = Path(base).expanduser()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if os.access(existing, os.W_OK) else Path(_private().name)


@functools.cache
def _private() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="qat_runner-")
