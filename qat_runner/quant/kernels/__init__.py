"""The operations that cost time, behind one small interface; a backend is one module that has them.

| operation                              | cost                                                                |
|----------------------------------------|---------------------------------------------------------------------|
| `octav(x, cost, guess, search)`        | one read of x an iteration; one in all where a row fits into cache  |
| `octav_and_quantize(x, cost, ...)`     | both of a training step: as octav, one read and one write after it  |
| `octav_and_quantize_all(xs, ...)`      | the same of several tensors, in one call                            |
| `remember(s, state)`                   | nothing but a call                                                  |
| `orient(x, s, before, ...)`            | one read                                                            |
| `refine(x, s, format, factors)`        | one read a factor; one in all where a row fits into cache           |
| `fake_quantize(x, s, format)`          | one read, one write                                                 |
| `fake_quantize_backward(g, x, s, ...)` | two reads, one write; needs x and s only, no mask is stored         |
| `fake_quantize_backward_all(gs, ...)`  | the same of several tensors, in one call                            |
| `learned_backward(g, x, s, ...)`       | likewise, with the sums that learned scalars need                   |

A format that a backend has no kernel for is served by `Format.fake_quantize`, and what several processes solve
together by eager.octav. `eager` is the reference: plain PyTorch, always available. `compiled` is C++ for the CPU,
`triton` is for CUDA devices. `auto`, the default, takes the fast one of each tensor's device, where there is a
compiler, and eager elsewhere. It chooses when a tensor of that device first comes, so importing costs nothing.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qat_runner.quant.backends import BACKENDS
from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import compiled, traced
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import recording


class Backend(Protocol):
    """What a backend module offers; `eager` documents it."""

    CALLS_COST: bool

    def octav(self, x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor: ...

    def octav_and_quantize(
        self, x: Tensor, cost: Cost, format: IntFormat, search: Search, state: Remembered, warm: bool
    ) -> tuple[Tensor, Tensor]: ...

    def octav_and_quantize_all(
        self,
        xs: Sequence[Tensor],
        cost: Cost,
        format: IntFormat,
        searches: Sequence[Search],
        states: Sequence[Remembered],
        warm: bool,
    ) -> tuple[list[Tensor], list[Tensor]]: ...

    def remember(self, s: Tensor, state: Remembered) -> None: ...

    def octav_interval(self, x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor: ...

    def orient(
        self, x: Tensor, s: Tensor, before: Tensor | None, halfway: float, clearly: float, pool: Pool | None = None
    ) -> Tensor: ...

    def refine(self, x: Tensor, s: Tensor, format: IntFormat, factors: Sequence[float]) -> Tensor: ...

    def fake_quantize(self, x: Tensor, s: Tensor, format: Format) -> Tensor: ...

    def fake_quantize_backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor: ...

    def fake_quantize_backward_all(
        self, grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat, gradient: str
    ) -> list[Tensor]: ...

    def learned_backward(
        self, grad: Tensor, x: Tensor, s: Tensor, format: IntFormat | IntAffineFormat, rounding: bool
    ) -> tuple[Tensor, Tensor]: ...


_asked = "auto"
"""What `set_backend` was told last; a name in BACKENDS, or auto."""


def load_backend(name: str) -> Backend:
    """The module of a name in BACKENDS; Triton is imported only when it is wanted."""
    module: Backend = importlib.import_module(f"qat_runner.quant.kernels.{name}")
    return module


def set_backend(name: str, device: str = "cpu") -> str:
    """Choose the backend of all quantization in this process; until it is called, that is auto.

    Tensors on a device that `name` does not serve have what auto gives there.

    Args:
        name: auto, or a name in BACKENDS.
        device: the type of device that `name` must serve, and that the answer is for: "cpu" or "cuda".

    Returns:
        The name of what serves that device now.

    Raises:
        ValueError: unknown name, or one that does not serve the device.

    Warns:
        RuntimeWarning: "compiled" was asked for and there is no compiler: eager is taken.
    """
    global _asked
    chosen = choose_backend(name, device)
    load_backend(chosen)
    _asked = name if name == "auto" else chosen
    _backend_of.cache_clear()  # the machine may have changed
    return chosen


def choose_backend(name: str, device: str = "cpu") -> str:
    """As `set_backend`, without setting it."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend={name}: must be one of auto, {', '.join(BACKENDS)}")
    if name == "auto":
        return _fastest(device)
    if device == "cuda":
        if name == "compiled":
            raise ValueError("backend=compiled: is for the CPU; on a CUDA device it must be auto, triton or eager")
        if name == "triton" and (reason := _no_triton()):
            raise ValueError(f"backend=triton: {reason}")
        return name
    if name == "triton" and not _interprets_triton():
        raise ValueError("backend=triton: needs a CUDA device; on the CPU it must be auto, compiled or eager")
    if name == "compiled" and not compiled.available():
        warnings.warn("backend=compiled: no C++ compiler found, taking eager", RuntimeWarning, stacklevel=3)
        return "eager"
    return name


def _fastest(device: str) -> str:
    """What auto means on a type of device."""
    if device == "cuda":
        if reason := _no_triton():
            warnings.warn(f"{reason}: taking eager, which is slower", RuntimeWarning, stacklevel=4)
        return "eager" if reason else "triton"
    if device == "cpu" and compiled.available():
        return "compiled"
    return "eager"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _no_triton() -> str:
    """Why Triton cannot launch kernels on a GPU here; "" if it can.

    It builds what launches them at first use, by a C compiler that PyTorch's own wheels do not bring.
    """
    if not _has_triton():
        return "Triton is not installed here"
    if torch.cuda.is_available():
        import triton

        try:
            triton.runtime.driver.active.utils  # noqa: B018
        except Exception as error:  # of the compiler, or of what it lacks
            return f"Triton cannot start here ({' '.join(str(error).split())[:200]})"
    return ""


def _interprets_triton() -> bool:
    return _has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


def backend(x: Tensor) -> Backend:
    """The backend that serves x; where operations are recorded, one of operators."""
    return traced if recording() else served_by(x)


def served_by(x: Tensor) -> Backend:
    """The backend whose kernels run on x."""
    return _backend_of(x.device.type, _asked)


@functools.cache
def _backend_of(device: str, asked: str) -> Backend:
    """The backend of a type of device; auto's where what was asked for is for another one."""
    return load_backend(choose_backend(asked if _serves(asked, device) else "auto", device))


def _serves(name: str, device: str) -> bool:
    """Whether a backend is for a type of device."""
    return {"compiled": device == "cpu", "triton": device == "cuda" or _interprets_triton()}.get(name, True)


@contextmanager
def using(name: str, device: str = "cpu") -> Iterator[str]:
    """While open, another backend is in force."""
    global _asked
    before = _asked
    try:
        yield set_backend(name, device)
    finally:
        _asked = before
