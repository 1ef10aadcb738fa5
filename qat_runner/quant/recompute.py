"""Saves memory in training: quantized tensors are recomputed in the backward pass instead of being kept for it.

A convolution keeps its input for the gradient of its weight. In full precision, this is the tensor that the previous
layer keeps anyway; a quantized input is an additional copy. Recomputing it takes one read and one write, and needs only
s and the unquantized tensor, which is in memory anyway.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat_runner.quant.quantizer import Quantizer
from qat_runner.quant.tensors import recording


@dataclass(frozen=True)
class Source(ABC):
    """How to recompute a tensor. It holds no reference to the tensor itself, which would keep it alive."""

    x: Tensor
    """the tensor to compute from, which is in memory anyway"""
    version: int
    """the version of x at the time of the forward pass"""

    @abstractmethod
    def made(self, first: int, last: int) -> tuple[Tensor, int]:
        """Return the tensor, or a part with at least the elements from `first` up to `last` (exclusive).

        Also returns the index of the first element of the result. Elements are indexed in the order of memory.
        """

    @torch.no_grad()
    def make(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """Return a view of the tensor that begins at the element with index `offset`."""
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of a quantized layer, of shape {list(self.x.shape)}, was changed in place after its use, "
                f"but the gradient of the weight needs the original values"
            )
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        tensor, first = self.made(offset, offset + reach + 1)
        return tensor.as_strided(size, stride, offset - first)


@dataclass(frozen=True)
class Quantized(Source):
    """How to recompute a tensor that was quantized from x."""

    s: Tensor
    by: Quantizer
    stride: tuple[int, ...]
    """strides of the original quantized tensor"""

    def made(self, first: int, last: int) -> tuple[Tensor, int]:
        again = self.by.quantized(self.x, self.s)
        if again.stride() != self.stride:  # operators use other strides, if only the backward pass is recorded
            again = torch.empty_strided(again.shape, self.stride, dtype=again.dtype, device=again.device).copy_(again)
        return again, 0


Sources = Mapping[tuple[int, int, torch.dtype], Source]
"""Sources by the `_memory` key of the tensors that are recomputed from them."""


def recomputing(
    *operands: tuple[Tensor, Tensor, nn.Module], parts: tuple[Tensor, Source] | None = None
) -> AbstractContextManager[object]:
    """Return a context in which operations save how to recompute a quantized tensor, instead of the tensor itself.

    Args:
        *operands: tuples of a quantized tensor, the tensor that it was quantized from, and the module that quantized
            it. Tensors that no Quantizer changed are saved as usual. Views that contain all elements of a quantized
            tensor are recognized.
        parts: a dense tensor, any view of which is recognized, and its source.

    Returns:
        A context manager. It has no effect if nothing is saved for a backward pass, or inside torch.compile, which
        decides on its own what to save.
    """
    if not saving():
        return nullcontext()
    sources = {
        _memory(q): Quantized(x.detach(), x._version, by.latest(), by, q.stride())
        for q, x, by in operands
        if isinstance(by, Quantizer) and can_be_made(q, x, by)
    }
    return remaking(sources, parts) if sources or parts is not None else nullcontext()


def saving() -> bool:
    """Whether operations save tensors for their backward pass, and this module may replace them."""
    return torch.is_grad_enabled() and not recording()


def can_be_made(quantized: Tensor, x: Tensor, by: Quantizer) -> bool:
    """Whether to recompute the output of a quantizer. A leaf is kept, since several batches use it."""
    return quantized is not x and not (quantized.is_leaf or by.holds)


def remaking(sources: Sources, parts: tuple[Tensor, Source] | None = None) -> AbstractContextManager[object]:
    """Return a context in which operations save these sources instead of tensors; see `recomputing`."""
    whole = None if parts is None else _Part.of(parts[0])  # not the tensor, which the hooks would keep alive
    source_of_parts = None if parts is None else parts[1]

    def pack(saved: Tensor) -> Any:
        source, offset = sources.get(_memory(saved)), 0
        if source is None and whole is not None and (part := _Part.of(saved)).is_in(whole):
            source, offset = source_of_parts, part.first - whole.first
        return saved if source is None else (source, saved.shape, saved.stride(), offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


class _Part(NamedTuple):
    """Location of a tensor in memory."""

    memory: int
    first: int
    elements: int
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Self:
        return cls(t.untyped_storage().data_ptr(), int(t.storage_offset()), t.numel(), t.dtype)

    def is_in(self, whole: Self) -> bool:
        """Whether this is a view of the dense tensor `whole`."""
        same = (self.memory, self.dtype) == (whole.memory, whole.dtype)
        return same and 0 <= self.first - whole.first < whole.elements


def remade(x: Tensor, source: Source) -> AbstractContextManager[object]:
    """Return a context in which operations save the source of x instead of x."""
    return remaking({_memory(x): source}) if saving() else nullcontext()


def _memory(t: Tensor) -> tuple[int, int, torch.dtype]:
    """Return a key that is the same for a dense tensor and for a view of all its elements."""
    return t.data_ptr(), t.numel(), t.dtype


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    source, size, stride, offset = saved
    made: Tensor = source.make(size, stride, offset)
    return made
