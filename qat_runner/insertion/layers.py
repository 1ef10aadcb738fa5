"""Layers that quantize what they multiply: convolutions and linear layers their weight and input, products both sides.

A layer is converted in place by swapping its class, so that the module object, its parameters, their names, its hooks
and every other reference to it stay what they were; converting back is the same swap. The quantizers are submodules,
`weight_quantizer` and `input_quantizer`; one that is not wanted is an identity.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.policy import WEIGHT_AND_INPUT
from qat_runner.quant.recompute import recomputing

LAYERS: dict[type[nn.Module], type[nn.Module]] = {}
"""Full-precision class -> quantized class. Only exact classes are converted: a subclass may compute something else."""


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d of a quantized input [N, C, H, W] with a quantized weight [K, C / groups, R, S]; bias untouched."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.input_quantizer(input), self.weight_quantizer(self.weight)
        with recomputing((x, input, self.input_quantizer), (weight, self.weight, self.weight_quantizer)):
            out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class QuantLinear(nn.Linear):
    """nn.Linear of a quantized input [..., C] with a quantized weight [K, C]; bias untouched."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.input_quantizer(input), self.weight_quantizer(self.weight)
        with recomputing((x, input, self.input_quantizer), (weight, self.weight, self.weight_quantizer)):
            return nn.functional.linear(x, weight, self.bias)


class QuantMatmul(nn.Module):
    """The matrix product of two quantized tensors, [..., L, C] and [..., C, K] -> [..., L, K].

    Args:
        operands: names of the two; their quantizers are submodules, `NAME_quantizer` each.
    """

    def __init__(self, operands: tuple[str, str]) -> None:
        super().__init__()
        self.operands = operands
        for name in operands:
            self.add_module(f"{name}_quantizer", nn.Identity())

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        by = [self.get_submodule(f"{name}_quantizer") for name in self.operands]
        a, b = by[0](left), by[1](right)
        with recomputing((a, left, by[0]), (b, right, by[1])):
            return torch.matmul(a, b)


LAYERS.update({nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear})


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is one of this file's layers, or of a class that a wrapper has made of one."""
    return isinstance(module, (*LAYERS.values(), QuantMatmul))


def kind_of(layer: nn.Module) -> str:
    """What policies call the kind of a layer, quantized or not: Conv2d, Linear, Matmul."""
    return next((kind.__name__ for kind in LAYERS if isinstance(layer, kind)), "Matmul")


def operands(layer: nn.Module) -> tuple[str, ...]:
    """Names of what a layer multiplies."""
    return layer.operands if isinstance(layer, QuantMatmul) else WEIGHT_AND_INPUT


def activations(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The operands, by name, that a call of a layer (quantized or of a class in LAYERS) is given."""
    if isinstance(layer, QuantMatmul):
        return dict(zip(layer.operands, args, strict=True))
    return {"input": args[0] if args else kwargs["input"]}


def quantizer_of(layer: nn.Module, operand: str) -> nn.Module:
    """The quantizer of an operand of a quantized layer, or an identity."""
    return layer.get_submodule(f"{operand}_quantizer")


def convert(layer: nn.Module, quantizers: Mapping[str, nn.Module | None]) -> None:
    """Turn a layer of a class in LAYERS into its quantized class, or give a product its quantizers, in place.

    Args:
        layer: to convert.
        quantizers: of each operand; None for full precision.
    """
    layer.__class__ = LAYERS.get(type(layer), type(layer))
    for name, quantizer in quantizers.items():
        layer.add_module(f"{name}_quantizer", quantizer if quantizer is not None else nn.Identity())
    layer.train(layer.training)


def full_precision_class(layer: nn.Module) -> type[nn.Module]:
    """The class in LAYERS that a layer had before `convert`.

    Raises:
        ValueError: something else has changed its class since, as fully_shard and parametrizations do.
    """
    for full, quantized in LAYERS.items():
        if type(layer) is quantized:
            return full
    raise ValueError(f"a quantized layer became a {type(layer).__name__}: what made it that must be undone first")


def restore(layer: nn.Module) -> None:
    """Undo `convert` of a layer of a class in LAYERS, in place; errors as of `full_precision_class`."""
    layer.__class__ = full_precision_class(layer)
    for name in WEIGHT_AND_INPUT:
        delattr(layer, f"{name}_quantizer")


def each(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """(name, module) of the wanted modules, in order of registration, each once, under its first name."""
    return [(name, module) for name, module in model.named_modules() if wanted(module)]
