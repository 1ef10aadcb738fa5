"""Latent weights: the parameters that training updates, and their positions on the grids they are quantized to.

The place of a weight is its quantization level, counted in step sizes from zero: a whole number. For plain integer
formats it is the code, multiplied by the sign of the scale in an oriented range; for affine formats it is the code
minus the zero point. A place therefore changes when a weight moves to another level, but not when a scale changes its
sign or a zero point moves.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qat_runner.insertion import quantized_tensors
from qat_runner.quant import IntAffineFormat, IntFormat, Quantizer


class LatentWeight(NamedTuple):
    """A parameter that is quantized directly, and its quantizer, which has clipping scalars once it has been called."""

    layer: str
    x: nn.Parameter
    quantizer: Quantizer

    @property
    def step(self) -> Tensor:
        """The step size given by the latest clipping scalars, 0 or greater: a single number, or one per row of x."""
        format = self.quantizer.format
        assert isinstance(format, IntFormat | IntAffineFormat)
        step: Tensor = format.step(self.quantizer.scalars)
        return step.abs()

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level given by the latest clipping scalars, each with the shape of `step`."""
        format, s = self.quantizer.format, self.quantizer.scalars
        assert isinstance(format, IntFormat | IntAffineFormat)
        one, other = (format.decode(torch.full_like(self.step, code), s) for code in (format.lowest, format.highest))
        return one.minimum(other), one.maximum(other)

    def quantized(self) -> Tensor:
        """x quantized with its latest clipping scalars, without gradient; same shape and dtype as x."""
        return self.quantizer.quantized(self.x.detach(), self.quantizer.scalars)

    def places(self) -> Tensor:
        """The places of the elements of x, in step sizes from zero: whole numbers, shape of x, at least float32."""
        step = self.step
        return (self.quantized() / step.where(step > 0, 1.0)).round()


def latent_weights(model: nn.Module, max_bits: int = 16) -> list[LatentWeight]:
    """The parameters of a model that are quantized directly to integers of at most `max_bits` bits, each listed once.

    Args:
        model: a quantized model.
        max_bits: largest bit-width to include, 2 to 16.
    """
    found: dict[nn.Parameter, LatentWeight] = {}
    for weight in _parameters(model):
        if isinstance(weight.quantizer.format, IntFormat | IntAffineFormat) and _bits(weight) <= max_bits:
            found.setdefault(weight.x, weight)
    return list(found.values())


def _parameters(model: nn.Module) -> Iterator[LatentWeight]:
    for tensor in quantized_tensors(model):
        if tensor.tensor == "weight":
            parameter = tensor.module.qat_used_parameter()  # type: ignore[operator]
            if parameter is not None:
                yield LatentWeight(tensor.layer, parameter, tensor.quantizer)


def _bits(weight: LatentWeight) -> int:
    return weight.quantizer.format.bits
