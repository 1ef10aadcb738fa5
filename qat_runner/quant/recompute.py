"""Less memory in training: quantized tensors are computed again in the backward pass instead of being kept for it.

A convolution keeps its input for the gradient of its weight. In full precision that is the tensor that the layer
before keeps anyway; quantized, it is a copy of its own. Fake quantization is one read and one write, and needs the
unquantized tensor, which is there, and s only.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.quant.quantizer import Quantizer
from qat_runner.quant.tensors import recording


@dataclass(frozen=True)
class _Source:
    """What a quantized tensor was made from; not the tensor itself, which would live on with it."""

    x: Tensor
    version: int
    s: Tensor
    by: Quantizer

    def make(self, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of a quantized layer, of shape {list(self.x.shape)}, was changed in place after its use: "
                f"the gradient of the weight needs it as it was"
            )
        with torch.no_grad():
            return self.by.quantized(self.x, self.s).as_strided(size, stride)


def recomputing(*operands: tuple[Tensor, Tensor, nn.Module]) -> AbstractContextManager[object]:
    """While open, an operation that saves a quantized tensor for its backward pass saves how to make it again.

    Args:
        *operands: (quantized tensor, what it was quantized from, the module that did it) each; those that no Quantizer
            changed are saved as ever. Views of a quantized tensor that hold all its elements are known as such.

    Returns:
        A context; one without effect where nothing is saved, and inside torch.compile, which plans its own saving.
    """
    if recording() or not torch.is_grad_enabled():
        return nullcontext()
    sources = {
        _memory(q): _source(x, by)
        for q, x, by in operands
        if isinstance(by, Quantizer) and q is not x and not (q.is_leaf or by.holds)  # a leaf: for several batches
    }
    if not sources:
        return nullcontext()

    def pack(saved: Tensor) -> Any:
        source = sources.get(_memory(saved))
        return saved if source is None else (source, saved.shape, saved.stride())

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _memory(t: Tensor) -> tuple[int, int, torch.dtype]:
    """The same for a dense tensor and for a view of all of it."""
    return t.data_ptr(), t.numel(), t.dtype


def _source(x: Tensor, quantizer: Quantizer) -> _Source:
    return _Source(x.detach(), x._version, quantizer.latest, quantizer)


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    source, size, stride = saved
    made: Tensor = source.make(size, stride)
    return made
