"""The operations that cost time, behind one small interface; a backend is one module that has them.

| operation                              | cost                                                                |
|----------------------------------------|---------------------------------------------------------------------|
| `reader(x, unit, signed, dims)`        | each `read(s)`: one read of x; a Newton step of OCTAV but scalars |
| `fake_quantize(x, s, grid)`            | one read, one write                                                 |
| `fake_quantize_backward(g, x, s, ...)` | two reads, one write; needs x and s only, no mask is stored         |

`eager` is the reference: plain PyTorch, always available. `compiled` fuses each operation into one loop with
torch.compile. `auto` takes compiled where a compiler is found, and eager elsewhere.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels import compiled, eager

Sums = tuple[Tensor, ...]
"""sum (a - s)+, #{a > s}, sum a, #{a > 0}, max a, where a are magnitudes in units of `unit`"""


class Backend(Protocol):
    """What a backend module offers; `eager` documents it."""

    def reader(self, x: Tensor, unit: Tensor, signed: bool, dims: tuple[int, ...]) -> Callable[[Tensor], Sums]: ...

    def fake_quantize(self, x: Tensor, s: Tensor, grid: Grid) -> Tensor: ...

    def fake_quantize_backward(self, grad: Tensor, x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor: ...


BACKENDS: dict[str, Backend] = {"eager": eager, "compiled": compiled}
"""The backends by name; "auto" chooses among them."""

_chosen: Backend = eager


def set_backend(name: str) -> str:
    """Choose the backend of all quantization in this process.

    Args:
        name: auto, or a name in BACKENDS.

    Returns:
        The name of what was chosen.

    Raises:
        ValueError: unknown name.

    Warns:
        RuntimeWarning: "compiled" was asked for and there is no compiler: eager is taken.
    """
    global _chosen
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend={name}: must be one of auto, {', '.join(BACKENDS)}")
    if name in ("auto", "compiled") and not compiled.available():
        if name == "compiled":
            warnings.warn("backend=compiled: no C++ compiler found, taking eager", RuntimeWarning, stacklevel=2)
        name = "eager"
    elif name == "auto":
        name = "compiled"
    _chosen = BACKENDS[name]
    return name


def backend() -> Backend:
    """The backend in force; eager until `set_backend` is called.

    Inside a torch.compile of the user's own it is always `compiled`, whose kernels are then taken in whole. They have
    neither in-place operations nor a result that is an alias: some versions of PyTorch differentiate through these,
    past the backward pass that is ours.
    """
    return compiled if torch.compiler.is_compiling() else _chosen


@contextmanager
def using(name: str) -> Iterator[str]:
    """While open, another backend is in force."""
    global _chosen
    before = _chosen
    try:
        yield set_backend(name)
    finally:
        _chosen = before
