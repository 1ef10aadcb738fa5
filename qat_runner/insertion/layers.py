"""Convolution and linear layers that quantize their weight and their input.

A layer is converted in place by swapping its class, so that the module object, its parameters, their names, its hooks
and every other reference to it stay what they were; converting back is the same swap. The quantizers are two
submodules, `weight_quantizer` and `input_quantizer`; one that is not wanted is an identity.
"""

from collections.abc import Callable

from torch import Tensor, nn

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


LAYERS.update({nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear})


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is one of this file's layers."""
    return type(module) in LAYERS.values()


def convert(layer: nn.Module, weight_quantizer: nn.Module | None, input_quantizer: nn.Module | None) -> None:
    """Turn a full-precision layer, of a class in LAYERS, into its quantized class, in place."""
    layer.__class__ = LAYERS[type(layer)]
    for name, quantizer in (("weight_quantizer", weight_quantizer), ("input_quantizer", input_quantizer)):
        layer.add_module(name, quantizer if quantizer is not None else nn.Identity())
    layer.train(layer.training)


def restore(layer: nn.Module) -> None:
    """Undo `convert`, in place."""
    layer.__class__ = next(full for full, quantized in LAYERS.items() if type(layer) is quantized)
    del layer.weight_quantizer
    del layer.input_quantizer


def each(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """(name, module) of the wanted modules, in order of registration, each once, under its first name."""
    return [(name, module) for name, module in model.named_modules() if wanted(module)]
