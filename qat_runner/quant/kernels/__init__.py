"""The time-critical operations behind one small interface; each backend is one module that implements them.

| operation                              | cost                                                                     |
|----------------------------------------|--------------------------------------------------------------------------|
| `octav(x, cost, guess, search)`        | one read of x per iteration; one in total where a row fits into cache    |
| `octav_and_quantize(x, cost, ...)`     | solve and round in a training step: as octav, then one read, one write   |
| `octav_and_quantize_all(xs, ...)`      | the same for several tensors, in one call                                |
| `octav_interval(x, noise, ...)`        | as octav, for formats with a lower and an upper clipping bound           |
| `remember(s, state)`                   | only the cost of the call                                                |
| `orient(x, s, before, ...)`            | one read                                                                 |
| `refine(x, s, format, factors)`        | one read per factor; one in total where a row fits into cache            |
| `fake_quantize(x, s, format)`          | one read, one write                                                      |
| `fake_quantize_backward(g, x, s, ...)` | two reads, one write; needs only x and s, no mask is stored              |
| `fake_quantize_backward_all(gs, ...)`  | the same for several tensors, in one call                                |
| `learned_backward(g, x, s, ...)`       | as fake_quantize_backward, plus the sums that learned scalars need       |

Where a backend has no kernel for a format, `Format.fake_quantize` is used. Where several processes solve together,
`eager.octav` is used. `eager` is the reference: plain PyTorch, always available. `compiled` is C++ for the CPU,
`triton` is for CUDA devices. `auto`, the default, uses the fast backend of each tensor's device if a compiler is
available, and eager otherwise. It chooses when it gets the first tensor on that device, so importing costs nothing.
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
    """The interface of a backend module; `eager` documents each function."""

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
"""The latest choice of `set_backend`: a name in BACKENDS, or auto."""


def load_backend(name: str) -> Backend:
    """Import and return the module for a name in BACKENDS; Triton is imported only on request."""
    module: Backend = importlib.import_module(f"qat_runner.quant.kernels.{name}")
    return module


def set_backend(name: str, device: str = "cpu") -> str:
    """Choose the backend for all quantization in this process. Before the first call, it is auto.

    Tensors on a device that `name` does not serve use the backend that auto chooses for that device.

    Args:
        name: auto, or a name in BACKENDS.
        device: the device type that `name` must serve and that the returned name is for: "cpu" or "cuda".

    Returns:
        The name of the backend that now serves that device.

    Raises:
        ValueError: the name is unknown, or the backend does not serve the device.

    Warns:
        RuntimeWarning: "compiled" was requested without a compiler, so eager is used; or auto cannot use Triton on a
            CUDA device, so eager is used.
    """
    global _asked
    chosen = choose_backend(name, device)
    load_backend(chosen)
    _asked = name if name == "auto" else chosen
    _backend_of.cache_clear()  # the machine may have changed
    return chosen


def choose_backend(name: str, device: str = "cpu") -> str:
    """Return the backend that `set_backend` would choose, without setting it."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend={name}: must be one of auto, {', '.join(BACKENDS)}")
    if name == "auto":
        return _fastest(device)
    if device == "cuda":
        if name == "compiled":
            raise ValueError("backend=compiled: must be auto, triton or eager on a CUDA device; compiled is for CPUs")
        if name == "triton" and (reason := _no_triton()):
            raise ValueError(f"backend=triton: {reason}")
        return name
    if name == "triton" and not _interprets_triton():
        raise ValueError("backend=triton: must be auto, compiled or eager on the CPU; triton needs a CUDA device")
    if name == "compiled" and not compiled.available():
        warnings.warn("backend=compiled: no C++ compiler found, using eager instead", RuntimeWarning, stacklevel=3)
        return "eager"
    return name


def _fastest(device: str) -> str:
    """Return the backend that auto stands for on a device type."""
    if device == "cuda":
        if reason := _no_triton():
            warnings.warn(f"{reason}: using eager instead, which is slower", RuntimeWarning, stacklevel=4)
        return "eager" if reason else "triton"
    if device == "cpu" and compiled.available():
        return "compiled"
    return "eager"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _no_triton() -> str:
    """Return the reason why Triton cannot launch kernels on a GPU of this machine; "" if it can.

    At first use, Triton builds its launcher with a C compiler, which PyTorch's wheels do not include.
    """
    if not _has_triton():
        return "Triton is not installed"
    if torch.cuda.is_available():
        import triton

        try:
            triton.runtime.driver.active.utils  # noqa: B018
        except Exception as error:  # from the compiler, or because something it needs is missing
            return f"Triton cannot start ({' '.join(str(error).split())[:200]})"
    return ""


def _interprets_triton() -> bool:
    return _has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


def backend(x: Tensor) -> Backend:
    """Return the backend to call for x; where operations are recorded, `traced`, which calls PyTorch operators."""
    return traced if recording() else served_by(x)


def served_by(x: Tensor) -> Backend:
    """Return the backend whose kernels run on x."""
    return _backend_of(x.device.type, _asked)


@functools.cache
def _backend_of(device: str, asked: str) -> Backend:
    """Return the backend of a device type; auto's choice where the requested backend does not serve it."""
    return load_backend(choose_backend(asked if _serves(asked, device) else "auto", device))


def _serves(name: str, device: str) -> bool:
    """Whether a backend serves a device type."""
    return {"compiled": device == "cpu", "triton": device == "cuda" or _interprets_triton()}.get(name, True)


@contextmanager
def using(name: str, device: str = "cpu") -> Iterator[str]:
    """Use another backend inside the context."""
    global _asked
    before = _asked
    try:
        yield set_backend(name, device)
    finally:
        _asked = before
