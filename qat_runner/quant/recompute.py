"""Less memory in training: quantized tensors are computed again in the backward pass instead of being kept for it.

A convolution keeps its input for the gradient of its weight. In full precision that is the tensor that the layer
before keeps anyway; quantized, it is a copy of its own. Fake quantization is one read and one write, and needs the
unquantized tensor, which is there, and s only.
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
    """What a tensor can be made from again; not the tensor itself, which would live on with it."""

    x: Tensor
    """what is there anyway"""
    version: int
    """its version then"""

    @abstractmethod
    def made(self, first: int, last: int) -> tuple[Tensor, int]:
        """The tensor, or at least its elements from one up to another, and the number of the one that it begins with.

        Elements are numbered as they lie in memory.
        """

    @torch.no_grad()
    def make(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """A view of the tensor, that begins with an element."""
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of a quantized layer, of shape {list(self.x.shape)}, was changed in place after its use: "
                f"the gradient of the weight needs it as it was"
            )
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        tensor, first = self.made(offset, offset + reach + 1)
        return tensor.as_strided(size, stride, offset - first)


@dataclass(frozen=True)
class Quantized(Source):
    """Of a tensor that is x, quantized."""

    s: Tensor
    by: Quantizer
    stride: tuple[int, ...]
    """of the tensor that was made first"""

    def made(self, first: int, last: int) -> tuple[Tensor, int]:
        again = self.by.quantized(self.x, self.s)
        if again.stride() != self.stride:  # as operators lay it out, if the backward pass alone is recorded
            again = torch.empty_strided(again.shape, self.stride, dtype=again.dtype, device=again.device).copy_(again)
        return again, 0


Sources = Mapping[tuple[int, int, torch.dtype], Source]
"""By `_memory` of what is made from them."""


def recomputing(
    *operands: tuple[Tensor, Tensor, nn.Module], parts: tuple[Tensor, Source] | None = None
) -> AbstractContextManager[object]:
    """While open, an operation that saves a quantized tensor for its backward pass saves how to make it again.

    Args:
        *operands: (quantized tensor, what it was quantized from, the module that did it) each; those that no Quantizer
            changed are saved as ever. Views of a quantized tensor that hold all its elements are known as such.
        parts: a dense tensor, any view of which is known as such, and what it is made from.

    Returns:
        A context; one without effect where nothing is saved, and inside torch.compile, which plans its own saving.
    """
    if not saving():
        return nullcontext()
    sources = {
        _memory(q): Quantized(x.detach(), x._version, by.latest, by, q.stride())
        for q, x, by in operands
        if isinstance(by, Quantizer) and can_be_made(q, x, by)
    }
    return remaking(sources, parts) if sources or parts is not None else nullcontext()


def saving() -> bool:
    """Whether operations save tensors for their backward pass, and it is for us to say what."""
    return torch.is_grad_enabled() and not recording()


def can_be_made(quantized: Tensor, x: Tensor, by: Quantizer) -> bool:
    """Whether what a quantizer made of x is better made again than kept; a leaf is there for several batches."""
    return quantized is not x and not (quantized.is_leaf or by.holds)


def remaking(sources: Sources, parts: tuple[Tensor, Source] | None = None) -> AbstractContextManager[object]:
    """While open, what is saved of these is how to make it; see `recomputing`."""
    whole = None if parts is None else _Part.of(parts[0])  # and not the tensor, which hooks would keep
    source_of_parts = None if parts is None else parts[1]

    def pack(saved: Tensor) -> Any:
        source, offset = sources.get(_memory(saved)), 0
        if source is None and whole is not None and (part := _Part.of(saved)).is_in(whole):
            source, offset = source_of_parts, part.first - whole.first
        return saved if source is None else (source, saved.shape, saved.stride(), offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


class _Part(NamedTuple):
    """Where a tensor lies."""

    memory: int
    first: int
    elements: int
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Self:
        return cls(t.untyped_storage().data_ptr(), int(t.storage_offset()), t.numel(), t.dtype)

    def is_in(self, whole: Self) -> bool:
        """Whether it is a view of a dense tensor."""
        same = (self.memory, self.dtype) == (whole.memory, whole.dtype)
        return same and 0 <= self.first - whole.first < whole.elements


def remade(x: Tensor, source: Source) -> AbstractContextManager[object]:
    """While open, what is saved of x is how to make it."""
    return remaking({_memory(x): source}) if saving() else nullcontext()


def _memory(t: Tensor) -> tuple[int, int, torch.dtype]:
    """The same for a dense tensor and for a view of all of it."""
    return t.data_ptr(), t.numel(), t.dtype


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    source, size, stride, offset = saved
    made: Tensor = source.make(size, stride, offset)
    return made
