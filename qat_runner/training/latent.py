"""Latent weights: the parameters that training moves, seen on the grids that they are quantized to.

A weight's place is its level in steps from zero, a whole number: for plain integers the code, with the sign of the
scale in an oriented range; for affine ones the code less the zero point. So a place changes where a weight does, and
not where a scale changes its sign or a zero point moves.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qat_runner.insertion import quantized_tensors
from qat_runner.quant import IntAffineFormat, IntFormat, Quantizer


class LatentWeight(NamedTuple):
    """A parameter that is quantized as it is, and its quantizer, which has scalars once it was called."""

    layer: str
    x: nn.Parameter
    quantizer: Quantizer

    @property
    def step(self) -> Tensor:
        """Distance of two levels by the latest scalars, above or equal to 0: a number, or one a row of x."""
        format = self.quantizer.format
        assert isinstance(format, IntFormat | IntAffineFormat)
        step: Tensor = format.step(self.quantizer.scalars)
        return step.abs()

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level by the latest scalars, shape of `step`."""
        format, s = self.quantizer.format, self.quantizer.scalars
        assert isinstance(format, IntFormat | IntAffineFormat)
        one, other = (format.decode(torch.full_like(self.step, code), s) for code in (format.lowest, format.highest))
        return one.minimum(other), one.maximum(other)

    def quantized(self) -> Tensor:
        """x as its latest scalars quantize it, shape and dtype of x; without a gradient."""
        return self.quantizer.quantized(self.x.detach(), self.quantizer.scalars)

    def places(self) -> Tensor:
        """Where x lies, in steps from zero: whole numbers, shape of x, float32 at least."""
        step = self.step
        return (self.quantized() / step.where(step > 0, 1.0)).round()


def latent_weights(model: nn.Module, max_bits: int = 16) -> list[LatentWeight]:
    """The parameters of a model that are quantized as they are, to integers of at most so many bits; each once.

    Args:
        model: quantized.
        max_bits: 2 to 16.
    """
    found: dict[nn.Parameter, LatentWeight] = {}
    for weight in _parameters(model):
        if isinstance(weight.quantizer.format, IntFormat | IntAffineFormat) and _bits(weight) <= max_bits:
            found.setdefault(weight.x, weight)
    return list(found.values())


def _parameters(model: nn.Module) -> Iterator[LatentWeight]:
    for tensor in quantized_tensors(model):
        if tensor.tensor == "weight":
            parameter = model.get_submodule(tensor.layer).qat_used_parameter()  # type: ignore[operator]
            if parameter is not None:
                yield LatentWeight(tensor.layer, parameter, tensor.quantizer)


def _bits(weight: LatentWeight) -> int:
    return weight.quantizer.format.bits
