"""Networks of integers: weights are codes and step sizes, activations are rounded to fixed grids.

`to_integers` turns the quantized layers of a static network into these, in place, by swapping their class. What they
compute is bit for bit what the quantized layers computed: a code times its step size D, which is a part of the clipping
scalar (see `quant.formats`), and negative where that is, in an oriented format.

The same forward pass serves two readers. As PyTorch runs or exports it, it is plain arithmetic. While torch.onnx
exports it, quantization is written in ONNX's own words; `formats` gives these their integer types.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.calls import Compute
from qat_runner.insertion.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLayer,
    QuantLinear,
    QuantMatmul,
    each,
    is_quantized,
    operands,
    quantizer_of,
)
from qat_runner.insertion.own_products import QuantAttention
from qat_runner.insertion.own_weights import OwnWeight, QuantOwnWeight, Used, from_rows
from qat_runner.quant import IntAffineFormat, Quantizer, StepFormat

OPSET = 21
"""The first version of ONNX's operators with 4-bit and 16-bit integers."""

TYPES = {"int4": 22, "uint4": 21, "int8": 3, "uint8": 2, "int16": 5, "uint16": 4}
"""Integer type -> ONNX's number of it."""


def integers_of(quantizer: Quantizer) -> StepFormat:
    """The format of a quantizer, whose codes are integers that a file can hold.

    Raises:
        ValueError: they are not, in a sentence that begins with the tensor's name.
    """
    format = quantizer.format
    if not isinstance(format, StepFormat) or format.storage_bits is None:
        raise ValueError(f"{quantizer.name} has numbers of format {format.name}, whose codes no integer type holds")
    return format


class IntegerWeight(nn.Module):
    """A weight as codes and step sizes.

    Args:
        weight: [K, ...], floating.
        quantizer: static, with scalars of shape [] or [K, 1, ...].
    """

    codes: Tensor
    """[K, ...], int8 up to 8 bits, int16 above"""
    scale: Tensor
    """step sizes D, [] or [K]"""
    zero_point: Tensor | None
    """the code of zero, of affine integers, shape of `scale`; None: 0"""

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        self.format = integers_of(quantizer)
        scale, zero = _step(quantizer.scalars, self.format), _zero_point(quantizer.scalars, self.format)
        codes = (quantizer.quantized(weight.detach().float(), quantizer.scalars) / scale).round()
        codes = codes if zero is None else codes + zero
        self.register_buffer("codes", codes.to(_holds(self.format)))
        self.register_buffer("scale", scale.reshape(-1) if scale.ndim else scale)
        self.register_buffer("zero_point", None)
        self.zeros = [0]
        if zero is not None:
            self.count_from(zero.reshape(-1) if zero.ndim else zero)

    def count_from(self, zero: Tensor) -> None:
        """Have this zero point, shape of `scale`."""
        self.zero_point = zero.to(self.codes.dtype)
        self.zeros = _listed(zero)

    def forward(self) -> Tensor:
        """The weight, [K, ...], float32."""
        if torch.onnx.is_in_onnx_export():
            axis = {"axis": 0} if self.scale.ndim else {}
            zeros = self.zeros  # no tensor: what an exporter records of one are its operations
            return _onnx("DequantizeLinear", self.codes, self.scale, zero_point=zeros, dtype=torch.float32, **axis)
        rows = (-1, *[1] * (self.codes.ndim - 1))
        codes = self.codes.to(torch.float32)
        codes = codes if self.zero_point is None else codes - self.zero_point.to(torch.float32).reshape(rows)
        return codes * self.scale.reshape(rows)


class StaticGrid(nn.Module):
    """Rounds an activation, any shape, to the grid of a static quantizer with one scalar."""

    scale: Tensor
    """the step size D, []"""
    zero_point: Tensor | None
    """the code of zero, of affine integers, []; None: 0"""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.format = integers_of(quantizer)
        zero = _zero_point(quantizer.scalars, self.format)
        self.register_buffer("scale", _step(quantizer.scalars, self.format))
        self.register_buffer("zero_point", zero if zero is None else zero.to(_holds(self.format)))
        self.zeros = [0] if zero is None else _listed(zero)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.format.lowest - self.zeros[0], self.format.highest - self.zeros[0]
        if not torch.onnx.is_in_onnx_export():
            return (x / self.scale).round().clamp(low, high) * self.scale
        code, zeros = TYPES[str(self.format.exported_type)], self.zeros
        codes = _onnx("QuantizeLinear", x, self.scale, zero_point=zeros, dtype=code, lowest=low, highest=high)
        return _onnx("DequantizeLinear", codes, self.scale, zero_point=zeros, dtype=torch.float32, shape=x.shape)


def _onnx(name: str, x: Tensor, scale: Tensor, *, dtype: Any, shape: Any = None, **attributes: Any) -> Tensor:
    """An operator of ONNX, as a call that only an exported graph can carry; `formats` takes its attributes further."""
    return torch.onnx.ops.symbolic(
        name, (x, scale), attributes, dtype=dtype, shape=x.shape if shape is None else shape, version=OPSET
    )


def _listed(zero: Tensor) -> list[int]:
    """Zero points, one or one a row."""
    return [int(z) for z in zero.reshape(-1).tolist()]


def _holds(format: StepFormat) -> torch.dtype:
    """The integer dtype of PyTorch that holds a format's codes."""
    if isinstance(format, IntAffineFormat):
        return torch.uint8 if format.code_bits <= 8 else torch.int32
    return torch.int8 if format.code_bits <= 8 else torch.int16


def _zero_point(s: Tensor, format: StepFormat) -> Tensor | None:
    """The code of zero, where there is a choice."""
    return format.zero_point(s.detach().float()) if isinstance(format, IntAffineFormat) else None


def _step(s: Tensor, format: StepFormat) -> Tensor:
    """Step sizes that belong to clipping scalars, float32."""
    return not_zero(format.step(s.detach().float()))


def not_zero(step: Tensor) -> Tensor:
    """Step sizes, float32, with the smallest normal number for those below it, which something is divided by."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(step.abs() < tiny, tiny, step)


class IntegerConv(nn.Module):
    """A QuantConv of one to three dimensions with a weight of codes, and a static grid for its input [N, C, ...]."""

    input_grid: nn.Module
    weight: Any
    bias: Any
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_grid(input)
        if self.bias is not None and _bias_apart(self):
            out: Tensor = self._conv_forward(x, _weight(self), None) + self.bias.reshape(-1, *[1] * (x.ndim - 2))
            return out
        return self._conv_forward(x, _weight(self), self.bias)


class IntegerConv1d(IntegerConv, nn.Conv1d):
    """For [N, C, L]."""


class IntegerConv2d(IntegerConv, nn.Conv2d):
    """For [N, C, H, W]."""


class IntegerConv3d(IntegerConv, nn.Conv3d):
    """For [N, C, D, H, W]."""


class IntegerLinear(nn.Linear):
    """A QuantLinear with a weight of codes, and a static grid for its input [..., C]."""

    for_others = True
    input_grid: nn.Module

    def forward(self, input: Tensor, compute: Compute | None = None) -> Tensor:
        x, weight = self.input_grid(input), _weight(self)
        if compute is not None:
            return compute(x, weight)
        if self.bias is not None and _bias_apart(self):
            return nn.functional.linear(x, weight) + self.bias
        return nn.functional.linear(x, weight, self.bias)


class IntegerMatmul(nn.Module):
    """A QuantMatmul with static grids for both operands."""

    operands: tuple[str, str]

    def forward(self, left: Tensor, right: Tensor, compute: Compute = torch.matmul) -> Tensor:
        a, b = (self.get_submodule(f"{name}_grid") for name in self.operands)
        return compute(a(left), b(right))


class IntegerOwnWeight(OwnWeight):
    """A QuantOwnWeight with codes in place of the parameter, and a static grid for its input."""

    input_grid: nn.Module
    turned: bool
    """whether the rows of codes are columns of the parameter"""

    def used(self) -> Used:
        codes: IntegerWeight | None = getattr(self, "integer_weight", None)
        return Used(self.weight if codes is None else from_rows(codes(), self.turned, self.weight.shape))

    def forward(self, input: Tensor, weight: Tensor, compute: Compute, used: Used) -> Tensor:
        return compute(self.input_grid(input), weight)


INTEGER: dict[type[nn.Module], type[nn.Module]] = {
    QuantConv1d: IntegerConv1d,
    QuantConv2d: IntegerConv2d,
    QuantConv3d: IntegerConv3d,
    QuantLinear: IntegerLinear,
    QuantMatmul: IntegerMatmul,
    QuantOwnWeight: IntegerOwnWeight,
}
"""Quantized class -> integer class."""


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight if (codes := getattr(layer, "integer_weight", None)) is None else codes()
    return weight  # type: ignore[no-any-return]


def _bias_apart(layer: nn.Module) -> bool:
    """Whether ONNX is to add the bias by itself: onnxruntime rounds a bias to the product of both step sizes, which is
    nothing at 8 bits, but coarse at 4."""
    weight = getattr(layer, "integer_weight", None)
    return torch.onnx.is_in_onnx_export() and weight is not None and weight.format.storage_bits == 4


def to_integers(model: nn.Module) -> nn.Module:
    """Replace the quantized layers of a static network by integer ones, in place.

    Args:
        model: all its quantizers static, with scalars (see `freeze`).

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: nothing is quantized; a layer of a kind that has no integer counterpart; a quantizer is dynamic
            still, has no scalars, has one a channel of an activation, or has codes that are no integers.
    """
    tensors = quantized_tensors(model)
    if not tensors:
        raise ValueError("nothing is quantized, so there are no integers to be had")
    for t in tensors:
        if t.quantizer.dynamic or not t.quantizer.ready:
            raise ValueError(f"{t.name} has no static clipping scalars: freeze(model, ...) gives it some")
        if t.tensor != "weight" and t.quantizer.dim is not None:
            raise ValueError(f"{t.name} has several clipping scalars, which no integer product of it could share")
    check_integers(model)
    inside = {
        layer for _, module in each(model, lambda m: isinstance(m, QuantAttention)) for layer in module.children()
    }
    for _, layer in each(model, is_quantized):
        _convert(layer, layer in inside)
    return model.eval()


def check_integers(model: nn.Module) -> None:
    """Refuse a quantized network of which no integers can be made.

    Raises:
        ValueError: a layer that no class here is for, or a tensor whose codes are no integers; in a sentence that
            begins with its name.
    """
    for t in quantized_tensors(model):
        layer = model.get_submodule(t.layer)
        if _integer_class(layer) is None:
            kinds = ", ".join(quantized.__name__.removeprefix("Quant") for quantized in INTEGER)
            raise ValueError(
                f"{t.layer} is a {type(layer).__name__.removeprefix('Quant')}, which cannot be written as integers, as "
                f"only {kinds} can: keep=[{t.layer!r}] would leave it in full precision"
            )
        integers_of(t.quantizer)


def _integer_class(layer: nn.Module) -> type[nn.Module] | None:
    return next((integer for quantized, integer in INTEGER.items() if isinstance(layer, quantized)), None)


def _convert(layer: nn.Module, inside: bool) -> None:
    """Make integers of a layer; inside of attention its weight may be what names it, so something stands there."""
    for operand in operands(layer):
        if operand == "weight":
            continue
        quantizer = quantizer_of(layer, operand)
        layer.add_module(f"{operand}_grid", StaticGrid(quantizer) if isinstance(quantizer, Quantizer) else quantizer)
        delattr(layer, f"{operand}_quantizer")
    if isinstance(layer, QuantLayer):
        if isinstance(quantizer := layer.weight_quantizer, Quantizer):
            _convert_weight(layer, quantizer, inside)
        del layer.weight_quantizer
    found = _integer_class(layer)
    assert found is not None
    layer.__class__ = found


def _convert_weight(layer: QuantLayer, quantizer: Quantizer, named: bool) -> None:
    """Put codes in place of a layer's weight; where it may be what names the layer, something stands there."""
    owner, name = layer, "weight"
    if isinstance(layer, QuantOwnWeight):
        (owner,), name, named = layer._of, layer.parameter, True  # type: ignore[assignment]
        layer.__dict__["turned"] = layer.turned
    shape = layer.weight.shape
    layer.add_module("integer_weight", IntegerWeight(layer.used_weight(), quantizer))
    delattr(owner, name)
    if named:
        owner.register_buffer(name, torch.zeros(()).expand(shape), persistent=False)
