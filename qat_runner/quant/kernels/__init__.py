"""The operations that cost time, behind one small interface; a backend is one module that has them.

| operation                              | cost                                                                |
|----------------------------------------|---------------------------------------------------------------------|
| `octav(x, k, signed, dims, ...)`       | one read of x an iteration; one in all where a row fits into cache  |
| `fake_quantize(x, s, grid)`            | one read, one write                                                 |
| `fake_quantize_backward(g, x, s, ...)` | two reads, one write; needs x and s only, no mask is stored         |

`eager` is the reference: plain PyTorch, always available. `compiled` is C++ for the CPU, `triton` is for CUDA devices.
`auto` takes the fast one of the device, where there is a compiler, and eager elsewhere.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels import compiled, eager, traced


class Backend(Protocol):
    """What a backend module offers; `eager` documents it."""

    def octav(
        self,
        x: Tensor,
        k: float,
        signed: bool,
        dims: tuple[int, ...],
        guess: Tensor | None,
        iterations: int,
        tolerance: float,
    ) -> Tensor: ...

    def fake_quantize(self, x: Tensor, s: Tensor, grid: Grid) -> Tensor: ...

    def fake_quantize_backward(self, grad: Tensor, x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor: ...


BACKENDS = ("eager", "compiled", "triton")
"""The names of the backends; "auto" chooses among them."""

_chosen: Backend = eager


def load_backend(name: str) -> Backend:
    """The module of a name in BACKENDS; Triton is imported only when it is wanted."""
    module: Backend = importlib.import_module(f"qat_runner.quant.kernels.{name}")
    return module


def set_backend(name: str, device: str = "cpu") -> str:
    """Choose the backend of all quantization in this process.

    Args:
        name: auto, or a name in BACKENDS.
        device: where tensors will lie: "cpu" or "cuda".

    Returns:
        The name of what was chosen.

    Raises:
        ValueError: unknown name, or one that does not serve the device.

    Warns:
        RuntimeWarning: "compiled" was asked for and there is no compiler: eager is taken.
    """
    global _chosen
    name = choose_backend(name, device)
    _chosen = load_backend(name)
    return name


def choose_backend(name: str, device: str = "cpu") -> str:
    """As `set_backend`, without setting it."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend={name}: must be one of auto, {', '.join(BACKENDS)}")
    if device == "cuda":
        if name == "compiled":
            raise ValueError("backend=compiled: is for the CPU; on a CUDA device it must be auto, triton or eager")
        if name == "triton" and not _has_triton():
            raise ValueError("backend=triton: Triton is not installed here")
        return ("triton" if _has_triton() else "eager") if name == "auto" else name
    if name == "triton" and not (_has_triton() and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError("backend=triton: needs a CUDA device; on the CPU it must be auto, compiled or eager")
    if name == "compiled" and not compiled.available():
        warnings.warn("backend=compiled: no C++ compiler found, taking eager", RuntimeWarning, stacklevel=3)
        return "eager"
    return ("compiled" if compiled.available() else "eager") if name == "auto" else name


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend() -> Backend:
    """The backend in force; eager until `set_backend` is called.

    Inside a torch.compile or a trace of the user's own it is what these can take in whole.
    """
    return traced if eager.recording() else _chosen


@contextmanager
def using(name: str, device: str = "cpu") -> Iterator[str]:
    """While open, another backend is in force."""
    global _chosen
    before = _chosen
    try:
        yield set_backend(name, device)
    finally:
        _chosen = before
