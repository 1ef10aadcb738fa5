"""The operations on a CPU, each one loop over memory in C++ (compiled.cpp), for float32 and bfloat16.

On first use, the machine's own compiler builds a library from the source in about a second. The library serves all
sizes and is kept in the user's cache folder for later processes. If compiling fails, a warning is issued once and
`eager` is used instead, as for other dtypes, devices and granularities.
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
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_runner.cache import cache_folder
from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import eager, remembered
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.kernels.views import dense, floats, in_layout_of, rows_and_length
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import scalar_shape

CALLS_COST = False  # see eager
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
TUNING = [["-march=native", "-fopenmp"], ["-march=native", "-fopenmp-simd"], ["-fopenmp"], ["-fopenmp-simd"], []]
"""Flag sets, tried in this order: not every compiler supports OpenMP threads, nearly every one OpenMP SIMD loops."""

OPERATIONS = (
    *("octav", "octav_and_quantize", "octav_and_quantize_all", "octav_interval", "orient", "refine", "remember"),
    *("fake_quantize", "fake_quantize_backward", "fake_quantize_backward_all", "learned_backward"),
)
"""The functions of the library; each is exported as qat_NAME."""


def compiler() -> str | None:
    """Return the path of a C++ compiler: the first found of the environment variable CXX, g++, clang++ and c++."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def available() -> bool:
    """Whether this machine has a C++ compiler."""
    return compiler() is not None


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav`. Rows that fit into the CPU cache are read from memory once."""
    library, where = _library_for(x), dense(x)
    s = torch.empty(scalar_shape(x, search.dims), dtype=torch.float32, device=x.device)
    size = rows_and_length(where, s)
    if size is None or library is None or search.pool is not None:
        return eager.octav(x, cost, guess, search)
    start, short = floats(guess), floats(cost.short)
    library.qat_octav(
        _half(x),
        where.data_ptr(),
        *size,
        None if start is None else start.data_ptr(),
        cost.noise,
        cost.signed,
        cost.reach,
        None if short is None else short.data_ptr(),
        search.iterations,
        search.tolerance,
        torch.get_num_threads(),
        s.data_ptr(),
    )
    return s


def octav_and_quantize(
    x: Tensor, cost: Cost, format: IntFormat, search: Search, state: Remembered, warm: bool
) -> tuple[Tensor, Tensor]:
    """As `eager.octav_and_quantize`, in one call."""
    library, where = _library_for(x), dense(x)
    size = rows_and_length(where, state.s)
    if size is None or library is None or cost.short is not None or not state.holds(x.device):
        return eager.octav_and_quantize(x, cost, format, search, state, warm)
    s, out = torch.empty_like(state.s), torch.empty_like(where)
    library.qat_octav_and_quantize(
        _half(x),
        where.data_ptr(),
        *size,
        cost.noise,
        cost.signed,
        cost.reach,
        search.iterations,
        search.tolerance,
        format.levels_per_scalar,
        format.resolution,
        format.lowest,
        format.highest,
        warm and state.known,
        state.weight,
        state.s.data_ptr(),
        state.running_s.data_ptr(),
        state.batches.data_ptr(),
        torch.get_num_threads(),
        s.data_ptr(),
        out.data_ptr(),
    )
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
    """As `eager.octav_and_quantize_all`, in one call; all rows are distributed over the threads."""
    x, search, state = xs[0], searches[0], states[0]
    library, where = _library_for(x), [dense(x) for x in xs]
    sizes = [rows_and_length(x, state.s) for x, state in zip(where, states, strict=True)]
    held = all(state.holds(x.device) for x, state in zip(xs, states, strict=True))
    if library is None or None in sizes or cost.short is not None or not (held and _alike(xs)):
        return eager.one_by_one(octav_and_quantize, xs, cost, format, searches, states, warm)
    ss, outs = [torch.empty_like(state.s) for state in states], [torch.empty_like(x) for x in where]
    parts = array("q")
    for x, size, state, s, out in zip(where, sizes, states, ss, outs, strict=True):
        assert size is not None
        state_at = state.s.data_ptr(), state.running_s.data_ptr(), state.batches.data_ptr()
        parts.extend((x.data_ptr(), *size, *state_at, s.data_ptr(), out.data_ptr()))
    library.qat_octav_and_quantize_all(
        _half(x),
        parts.buffer_info()[0],
        len(xs),
        cost.noise,
        cost.signed,
        cost.reach,
        search.iterations,
        search.tolerance,
        format.levels_per_scalar,
        format.resolution,
        format.lowest,
        format.highest,
        warm and state.known,
        state.weight,
        torch.get_num_threads(),
    )
    for state in states:
        state.written()
    return ss, outs


def remember(s: Tensor, state: Remembered) -> None:
    """As `remembered.remember`, in one call."""
    library = _library_for(state.s)
    if library is None or s.dtype != torch.float32 or not state.holds(s.device):
        remembered.remember(s, state)
        return
    s = s.expand(state.s.shape).contiguous()
    library.qat_remember(
        s.data_ptr(),
        s.numel(),
        state.weight,
        state.s.data_ptr(),
        state.running_s.data_ptr(),
        state.batches.data_ptr(),
    )
    state.written()


def octav_interval(x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav_interval`. Rows that fit into the CPU cache are read from memory once."""
    library, where = _library_for(x), dense(x)
    ends = torch.empty((2, *scalar_shape(x, search.dims)), dtype=torch.float32, device=x.device)
    size = rows_and_length(where, ends, 2)
    if size is None or library is None or search.pool is not None:
        return eager.octav_interval(x, noise, guess, search)
    start = floats(guess)
    library.qat_octav_interval(
        _half(x),
        where.data_ptr(),
        *size,
        None if start is None else start.data_ptr(),
        noise,
        search.iterations,
        search.tolerance,
        torch.get_num_threads(),
        ends.data_ptr(),
    )
    return ends


def orient(
    x: Tensor, s: Tensor, before: Tensor | None, halfway: float, clearly: float, pool: Pool | None = None
) -> Tensor:
    """As `eager.orient`; one read."""
    library, where = _library_for(x), dense(x)
    size = rows_and_length(where, s)
    if library is None or size is None or pool is not None:
        return eager.orient(x, s, before, halfway, clearly, pool)
    scalars, signs = floats(s), floats(before)
    out = torch.empty_like(scalars)
    library.qat_orient(
        _half(x),
        where.data_ptr(),
        scalars.data_ptr(),
        None if signs is None else signs.data_ptr(),
        *size,
        halfway,
        clearly,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def refine(x: Tensor, s: Tensor, format: IntFormat, factors: Sequence[float]) -> Tensor:
    """As `eager.refine`. Rows that fit into the CPU cache are read from memory once."""
    library, where = _library_for(x), dense(x)
    size = rows_and_length(where, s)
    if library is None or size is None:
        return eager.refine(x, s, format, factors)
    scalars = floats(s)
    out = torch.empty_like(scalars)
    tried = torch.tensor(factors, dtype=torch.float32, device=x.device)
    library.qat_refine(
        _half(x),
        where.data_ptr(),
        scalars.data_ptr(),
        *size,
        format.levels_per_scalar,
        format.lowest,
        format.highest,
        tried.data_ptr(),
        len(tried),
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`; one read and one write."""
    library, where = _library_for(x), dense(x)
    size = rows_and_length(where, s, format.parts)
    if library is None or size is None or not isinstance(format, IntFormat | IntAffineFormat):
        return eager.fake_quantize(x, s, format)
    scalars = floats(s)
    out = torch.empty_like(where)
    units, levels = _grid(format, scalars)
    library.qat_fake_quantize(
        _half(x),
        where.data_ptr(),
        units.data_ptr(),
        *size,
        format.parts,
        *levels,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`; two reads and one write."""
    if gradient == "ste":
        return grad
    library, where = _library_for(x), dense(x)
    size = rows_and_length(where, s, format.parts)
    if library is None or size is None or grad.dtype != x.dtype:
        return eager.fake_quantize_backward(grad, x, s, format, gradient)
    there, scalars = in_layout_of(grad, where), floats(s)
    out = torch.empty_like(where)
    library.qat_fake_quantize_backward(
        _half(x),
        there.data_ptr(),
        where.data_ptr(),
        scalars.data_ptr(),
        *size,
        format.parts,
        format.signed,
        gradient == "mad",
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def fake_quantize_backward_all(
    grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat, gradient: str
) -> list[Tensor]:
    """As `eager.fake_quantize_backward_all`, in one call."""
    library, where = _library_for(xs[0]), [dense(x) for x in xs]
    sizes = [rows_and_length(x, s) for x, s in zip(where, ss, strict=True)]
    if gradient == "ste" or library is None or None in sizes or not _alike([*grads, *xs]):
        return [fake_quantize_backward(*part, format, gradient) for part in zip(grads, xs, ss, strict=True)]
    there = [in_layout_of(grad, x) for grad, x in zip(grads, where, strict=True)]
    scalars, outs = [floats(s) for s in ss], [torch.empty_like(x) for x in where]
    parts = array("q")
    for grad, x, size, s, out in zip(there, where, sizes, scalars, outs, strict=True):
        assert size is not None
        parts.extend((grad.data_ptr(), x.data_ptr(), *size, s.data_ptr(), out.data_ptr()))
    library.qat_fake_quantize_backward_all(
        _half(xs[0]),
        parts.buffer_info()[0],
        len(xs),
        format.signed,
        gradient == "mad",
        torch.get_num_threads(),
    )
    return outs


def learned_backward(
    grad: Tensor, x: Tensor, s: Tensor, format: IntFormat | IntAffineFormat, rounding: bool
) -> tuple[Tensor, Tensor]:
    """As `eager.learned_backward`; two reads and one write."""
    library, where = _library_for(x), dense(x)
    size = rows_and_length(where, s, format.parts)
    if library is None or size is None or grad.dtype != x.dtype:
        return eager.learned_backward(grad, x, s, format, rounding)
    there, scalars = in_layout_of(grad, where), floats(s)
    out, sums = torch.empty_like(where), torch.empty_like(scalars)
    units, levels = _grid(format, scalars)
    library.qat_learned_backward(
        _half(x),
        there.data_ptr(),
        where.data_ptr(),
        units.data_ptr() if rounding else scalars.data_ptr(),
        *size,
        format.parts,
        *levels,
        format.signed,
        rounding,
        torch.get_num_threads(),
        out.data_ptr(),
        sums.data_ptr(),
    )
    return out, sums


def _grid(format: IntFormat | IntAffineFormat, s: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return what the library rounds with: the scalars, and (resolution, lowest code, highest code)."""
    if isinstance(format, IntFormat):
        return format.full_scale(s), (format.resolution, format.lowest, format.highest)
    return s, (format.levels_per_scalar, 0, 0)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether the library serves all tensors in the same way."""
    dtype = tensors[0].dtype
    return all(t.dtype == dtype and type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)


def _half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _library_for(x: Tensor) -> ctypes.CDLL | None:
    """Return the library; None if it does not serve the tensor or could not be built."""
    plain = type(x) in (Tensor, nn.Parameter)  # subclasses may have no memory of their own, or interpret it differently
    served = plain and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return library() if served else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library of compiled operations; if compiling fails, warn and return None."""
    try:
        return _loaded()
    except (OSError, RuntimeError, AttributeError) as error:  # the last: a symbol is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"backend=compiled: compiling failed, using eager instead ({reason})", RuntimeWarning, stacklevel=5
        )
        return None


def _loaded() -> ctypes.CDLL:
    """Load the library from the cache; build it again if the cached file is unusable, for example truncated."""
    path = _cached()
    if path.is_file():
        try:
            return _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            path.unlink(missing_ok=True)
    _build(path)
    return _declared(ctypes.CDLL(str(path)))


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the library's functions and return the library."""
    pointer, long, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    tensor = (integer, pointer)  # whether it is bfloat16, and its address
    rows = (long, long)
    loaded.qat_octav.argtypes = [*tensor, *rows, pointer, real, integer, real, pointer, integer, real, integer, pointer]
    loaded.qat_refine.argtypes = [*tensor, pointer, *rows, *[integer] * 3, pointer, integer, integer, pointer]
    loaded.qat_orient.argtypes = [*tensor, pointer, pointer, *rows, real, real, integer, pointer]
    loaded.qat_fake_quantize.argtypes = [*tensor, pointer, *rows, *[integer] * 5, pointer]
    loaded.qat_fake_quantize_backward.argtypes = [*tensor, pointer, pointer, *rows, *[integer] * 4, pointer]
    loaded.qat_learned_backward.argtypes = [*tensor, pointer, pointer, *rows, *[integer] * 7, pointer, pointer]
    loaded.qat_octav_interval.argtypes = [*tensor, *rows, pointer, real, integer, real, integer, pointer]
    loaded.qat_octav_and_quantize.argtypes = [
        *(*tensor, *rows, real, integer, real, integer, real),  # the tensor and the solver's settings
        *[integer] * 4,  # the format
        *(integer, real, pointer, pointer, pointer),  # the state
        *(integer, pointer, pointer),
    ]
    several = (integer, pointer, long)  # as `tensor`, but the address of a table of parts; the number of parts
    loaded.qat_octav_and_quantize_all.argtypes = [
        *(*several, real, integer, real, integer, real),
        *[integer] * 4,
        *(integer, real, integer),
    ]
    loaded.qat_fake_quantize_backward_all.argtypes = [*several, *[integer] * 3]
    loaded.qat_remember.argtypes = [pointer, long, real, pointer, pointer, pointer]
    for name in OPERATIONS:
        function = getattr(loaded, f"qat_{name}")
        function.restype = None
    return loaded


def _compiler() -> str:
    """As `compiler`; raises RuntimeError if there is none."""
    if (command := compiler()) is None:
        raise RuntimeError("no C++ compiler found")
    return command


def _cached() -> Path:
    """Return the path of the library in the cache, whether or not it has been built."""
    return cache_folder() / f"kernels-{_fingerprint(_compiler())}.so"


def _build(path: Path) -> None:
    """Compile the library to `path`."""
    command = _compiler()
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
                os.replace(made, path)  # atomic, because other processes may build the same file
                return
    raise RuntimeError(done.stderr or f"{command} failed")


def _fingerprint(command: str) -> str:
    """Hash everything that determines the library: source, flags, compiler, and the CPU it is tuned for."""
    version = subprocess.run([command, "--version"], capture_output=True).stdout
    return hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS, TUNING, version, _processor())).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
