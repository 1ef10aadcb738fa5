"""Networks of integers: weights are codes and step sizes, activations are rounded to fixed grids.

`to_integers` turns the quantized layers of a static network into integer layers, in place, by swapping their classes.
Bit for bit they compute what the quantized layers computed: a code times its step size D. The step size is a fraction
of the clipping scalar (see `quant.formats`); in an oriented format it is negative where the scalar is.

The same forward pass serves two purposes. When PyTorch runs or exports it, it is plain arithmetic. While torch.onnx
exports it, quantization is written as operators of ONNX, which `formats` gives their integer types.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import is_pruned, remove

from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.calibrate import check_constant
from qat_runner.insertion.calls import Compute
from qat_runner.insertion.insert import idle_layers
from qat_runner.insertion.layers import (
    QuantLinear,
    QuantMatmul,
    Swapped,
    TakenLayer,
    each,
    full_precision_class,
    is_quantized,
    operands,
    quantized_class,
    quantizer_of,
    restore,
)
from qat_runner.insertion.own_products import QuantAttention, QuantProjection
from qat_runner.insertion.own_weights import OwnWeight, QuantOwnWeight, Used, from_rows
from qat_runner.quant import IntAffineFormat, Quantizer, StepFormat

OPSET = 21
"""The first version of ONNX's operators with 4-bit and 16-bit integers."""

TYPES = {"int4": 22, "uint4": 21, "int8": 3, "uint8": 2, "int16": 5, "uint16": 4}
"""Integer type -> its number in ONNX."""


def integers_of(quantizer: Quantizer) -> StepFormat:
    """Return the format of a quantizer, if its codes are integers that a file can hold.

    Raises:
        ValueError: they are not; the message begins with the name of the tensor.
    """
    format = quantizer.format
    if not isinstance(format, StepFormat) or format.storage_bits is None:
        raise ValueError(f"{quantizer.name} has numbers of format {format.name}, whose codes no integer type holds")
    return format


class IntegerWeight(nn.Module):
    """A weight as codes and step sizes.

    Args:
        weight: [K, ...], floating point.
        quantizer: static, with scalars of shape [] or [K, 1, ...]; the K channels may be in another dimension.
    """

    codes: Tensor
    """[K, ...], int8 up to 8 bits, int16 above; of affine integers uint8 up to 8 bits, int32 above"""
    scale: Tensor
    """step sizes D, [] or [K]"""
    zero_point: Tensor | None
    """the code of zero, for affine integers, in the shape of `scale`; None: 0"""

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        self.format = integers_of(quantizer)
        self.axis = quantizer.dim or 0
        """the dimension of the weight that has one step size per index, if there are several"""
        scale, zero = _step(quantizer.scalars, self.format), _zero_point(quantizer.scalars, self.format)
        codes = (quantizer.quantized(weight.detach().float(), quantizer.scalars) / scale).round()
        codes = codes if zero is None else codes + zero
        self.register_buffer("codes", codes.to(_holds(self.format)))
        self.register_buffer("scale", scale.reshape(-1) if scale.ndim else scale)
        self.register_buffer("zero_point", None)
        self.zeros = [0]
        if zero is not None:
            self.set_zero_point(zero.reshape(-1) if zero.ndim else zero)

    def set_zero_point(self, zero: Tensor) -> None:
        """Set the zero point, in the shape of `scale`."""
        self.zero_point = zero.to(self.codes.dtype)
        self.zeros = _listed(zero)

    def forward(self) -> Tensor:
        """Return the weight, [K, ...], float32."""
        if torch.onnx.is_in_onnx_export():
            axis = {"axis": self.axis} if self.scale.ndim else {}
            zeros = self.zeros  # not a tensor, of which an exporter would record operations
            return _onnx("DequantizeLinear", self.codes, self.scale, zero_point=zeros, dtype=torch.float32, **axis)
        rows = [-1 if i == self.axis else 1 for i in range(self.codes.ndim)]
        codes = self.codes.to(torch.float32)
        codes = codes if self.zero_point is None else codes - self.zero_point.to(torch.float32).reshape(rows)
        return codes * self.scale.reshape(rows)


class StaticGrid(nn.Module):
    """Rounds an activation of any shape to the grid of a static quantizer with one clipping scalar."""

    scale: Tensor
    """the step size D, []"""
    zero_point: Tensor | None
    """the code of zero, for affine integers, []; None: 0"""

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
    """Call an operator of ONNX, as only an exported graph can; `formats` processes its attributes later."""
    return torch.onnx.ops.symbolic(
        name, (x, scale), attributes, dtype=dtype, shape=x.shape if shape is None else shape, version=OPSET
    )


def _listed(zero: Tensor) -> list[int]:
    """Return zero points, a single one or one per row, as a list."""
    return [int(z) for z in zero.reshape(-1).tolist()]


def _holds(format: StepFormat) -> torch.dtype:
    """Return the integer dtype of PyTorch that holds the codes of a format."""
    if isinstance(format, IntAffineFormat):
        return torch.uint8 if format.code_bits <= 8 else torch.int32
    return torch.int8 if format.code_bits <= 8 else torch.int16


def _zero_point(s: Tensor, format: StepFormat) -> Tensor | None:
    """Return the code of zero of affine integers; None for other formats."""
    return format.zero_point(s.detach().float()) if isinstance(format, IntAffineFormat) else None


def _step(s: Tensor, format: StepFormat) -> Tensor:
    """Return the step sizes for clipping scalars, float32."""
    return not_zero(format.step(s.detach().float()))


def not_zero(step: Tensor) -> Tensor:
    """Return step sizes, float32, with the smallest normal number in place of smaller ones: they are divided by."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(step.abs() < tiny, tiny, step)


LARGEST_BIAS = 2.0**30
"""In units of the product of both step sizes; it leaves room in 32 bits for the sums of products."""


class IntegerLayer(nn.Module):
    """A layer with codes for its weight and static grids for its other operands, where these are quantized."""

    weight: Any
    large_bias = False
    """whether the bias, in units of the product of both step sizes, is too large for 32 bits"""

    @property
    def multiplied_weight(self) -> Tensor:
        """The weight by which the layer multiplies, computed from codes, or as it is."""
        codes = self._modules.get("integer_weight")
        weight: Tensor = self.weight if codes is None else codes()
        return weight

    def on_grid(self, x: Tensor, operand: str = "input") -> Tensor:
        """Return an operand rounded to its grid; unchanged if it has none."""
        grid = self._modules.get(f"{operand}_grid")
        on_grid: Tensor = x if grid is None else grid(x)
        return on_grid

    @property
    def bias_apart(self) -> bool:
        """Whether ONNX should add the bias in a separate node.

        onnxruntime rounds a bias to a multiple of the product of both step sizes, which is negligible at 8 bits, but
        coarse at 4. It also clips the multiple to 32 bits, which matters for a row of weights that are almost zero.
        """
        codes: Any = self._modules.get("integer_weight")
        apart = codes is not None and (codes.format.storage_bits == 4 or self.large_bias)
        return apart and torch.onnx.is_in_onnx_export()

    @torch.no_grad()
    def measure_bias(self) -> None:
        """Find out whether the bias is large; folding may change that."""
        codes, grid = self._modules.get("integer_weight"), self._modules.get("input_grid")
        bias = getattr(self, "bias", None)
        if isinstance(codes, IntegerWeight) and isinstance(grid, StaticGrid) and isinstance(bias, Tensor):
            steps = codes.scale.abs() if codes.scale.numel() in (1, len(bias)) else codes.scale.abs().min()
            unit = grid.scale.abs().double() * steps.double()
            self.large_bias = bool((bias.abs().double() >= unit * LARGEST_BIAS).any())


class IntegerConv(IntegerLayer):
    """Integer version of QuantConv, of one to three dimensions, for [N, C, ...] or [C, ...]."""

    bias: Any
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.on_grid(input), self.multiplied_weight
        if self.bias is not None and self.bias_apart:
            out: Tensor = self._conv_forward(x, weight, None) + self.bias.reshape(-1, *[1] * (weight.ndim - 2))
            return out
        return self._conv_forward(x, weight, self.bias)


class IntegerConv1d(IntegerConv, nn.Conv1d):
    """For [N, C, L]."""


class IntegerConv2d(IntegerConv, nn.Conv2d):
    """For [N, C, H, W]."""


class IntegerConv3d(IntegerConv, nn.Conv3d):
    """For [N, C, D, H, W]."""


class IntegerLinear(IntegerLayer, nn.Linear):
    """Integer version of QuantLinear, for [..., C]."""

    qat_for_others = True

    def forward(self, input: Tensor, compute: Compute | None = None) -> Tensor:
        x, weight = self.on_grid(input), self.multiplied_weight
        if compute is not None:
            return compute(x, weight)
        if self.bias is not None and self.bias_apart:
            return nn.functional.linear(x, weight) + self.bias
        return nn.functional.linear(x, weight, self.bias)


class IntegerOwnForward(IntegerLayer, TakenLayer):
    """A layer with a forward of its own; the weight that it multiplies by was computed once and for all."""

    qat_operands = ()

    def qat_multiply(self, input: Tensor, weight: Tensor, compute: Compute) -> Tensor:
        codes = self._modules.get("integer_weight")
        return compute(self.on_grid(input), weight if codes is None else codes())


class IntegerProjection(IntegerLayer, QuantProjection):
    """A projection of `nn.MultiheadAttention`; if it has codes, the attention may no longer have its weight."""

    qat_operands = ()

    @property
    def weight(self) -> Tensor:
        """[K, C]; a placeholder if there are codes."""
        placeholder = self._buffers.get("placeholder")
        return super().weight if placeholder is None else placeholder

    def forward(self, input: Tensor, compute: Compute) -> Tensor:
        """Return what `compute` makes of the input and the weight of this layer."""
        return compute(self.on_grid(input), self.multiplied_weight)


class IntegerMatmul(IntegerLayer):
    """Integer version of QuantMatmul."""

    operands: tuple[str, str]

    def forward(self, left: Tensor, right: Tensor, compute: Compute = torch.matmul, summed: object = None) -> Tensor:
        a, b = self.operands
        return compute(self.on_grid(left, a), self.on_grid(right, b))


class IntegerOwnWeight(IntegerLayer, OwnWeight):
    """Integer version of QuantOwnWeight, whose codes replace the parameter."""

    turned: bool
    """whether the rows of codes are columns of the parameter"""

    def used(self) -> Used:
        codes: Any = self._modules.get("integer_weight")
        return Used(self.weight if codes is None else from_rows(codes(), self.turned, self.weight.shape))

    def forward(self, input: Tensor, weight: Tensor, compute: Compute, used: Used) -> Tensor:
        return compute(self.on_grid(input), weight)


def to_integers(model: nn.Module) -> nn.Module:
    """Replace the quantized layers of a static network by integer ones, in place.

    Args:
        model: all its quantizers are static and have clipping scalars (see `freeze`), except in layers that were never
            in use: these are left in full precision, and raise a ValueError if they are used nevertheless.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: nothing is quantized; a quantizer is still dynamic, has no clipping scalars, has one per channel of
            an activation, or has codes that are not integers; or a layer is rotated.
    """
    tensors = quantized_tensors(model)
    if not tensors:
        raise ValueError("nothing is quantized, so there are no integers to write")
    check_constant({t.name: t.quantizer for t in tensors})
    idle = {layer for layer in idle_layers(model) if not _is_ready(layer)}
    for t in (t for t in tensors if t.module not in idle):
        if t.quantizer.dynamic:
            raise ValueError(f"{t.name} has no static clipping scalars: call freeze(model, ...) first")
        if not t.quantizer.ready:
            raise ValueError(f"{t.name} has no clipping scalars: call calibrate(model, ...) with batches that reach it")
        if t.tensor != "weight" and t.quantizer.dim is not None:
            raise ValueError(f"{t.name} has several clipping scalars, but integer products need a single one for it")
    check_integers(model)
    for name, layer in each(model, is_quantized):
        if layer in idle:
            _release(layer)
            layer.register_forward_pre_hook(partial(_refuse, name))
        else:
            _convert(layer)
    for _, module in each(model, lambda m: isinstance(m, QuantAttention)):
        _drop_projected_weights(module)
    return model.eval()


def _is_ready(layer: nn.Module) -> bool:
    """Whether all quantizers of a layer have the scalars that they need."""
    by = [quantizer_of(layer, operand) for operand in operands(layer)]
    return all(q.ready for q in by if isinstance(q, Quantizer))


def _refuse(name: str, layer: nn.Module, args: object) -> None:
    raise ValueError(f"{name} was not in use when the network was frozen, so it has no clipping scalars")


def check_integers(model: nn.Module) -> None:
    """Check that a quantized network can be written as integers.

    Raises:
        ValueError: the codes of a tensor are not integers, or a layer is rotated; the message begins with its name.
    """
    for t in quantized_tensors(model):
        integers_of(t.quantizer)
    for name, layer in each(model, lambda m: isinstance(m, QuantLinear)):
        if layer.qat_rotation is not None:
            raise ValueError(f"{name} is rotated, which files of integers do not support")


WRITTEN: dict[type[nn.Module], type[IntegerLayer]] = {
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
    nn.Conv3d: IntegerConv3d,
    nn.Linear: IntegerLinear,
    QuantMatmul: IntegerMatmul,
    QuantProjection: IntegerProjection,
    QuantOwnWeight: IntegerOwnWeight,
}
"""Class -> integer class, for classes whose forward is known."""


def _convert(layer: Any) -> None:
    quantizers = {operand: quantizer_of(layer, operand) for operand in operands(layer)}
    taken = isinstance(layer, TakenLayer)
    codes = quantizers.pop("weight", None)
    weight = IntegerWeight(layer.qat_used_weight(), codes) if isinstance(codes, Quantizer) else None
    if isinstance(layer, QuantOwnWeight):
        layer.__dict__["turned"] = layer.turned  # until now its quantizer determined it
    _release(layer)
    for operand, quantizer in quantizers.items():
        if isinstance(quantizer, Quantizer):
            layer.add_module(f"{operand}_grid", StaticGrid(quantizer))
    if weight is not None:
        _give_codes(layer, weight)
    known = next((integer for base, integer in WRITTEN.items() if isinstance(layer, base)), None)
    layer.__class__ = quantized_class(type(layer), IntegerOwnForward) if taken else known


def _release(layer: Any) -> None:
    """Remove the quantizers from a layer, and what computes its weight from parameters."""
    if isinstance(layer, Swapped):
        restore(layer)
    else:
        for operand in operands(layer):
            delattr(layer, f"{operand}_quantizer")
    _settle(layer)


def _settle(module: Any) -> None:
    """Turn the tensors of a module that are pruned or parametrized into plain parameters."""
    for name in [b.removesuffix("_mask") for b in module._buffers if b.endswith("_mask")] if is_pruned(module) else ():
        remove(module, name)
    if is_parametrized(module):  # PyTorch's own removal deletes properties of a class that copies share
        made = {name: getattr(module, name).detach() for name in module.parametrizations}
        if isinstance(module, Swapped):
            module.__class__ = quantized_class(full_precision_class(module).__bases__[0], module.qat_base)
        else:
            module.__class__ = type_before_parametrizations(module)
        del module.parametrizations
        for name, value in made.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _give_codes(layer: Any, codes: IntegerWeight) -> None:
    """Replace a weight by codes, and by zeros where networks access it, to ask for its dtype, for example."""
    layer.add_module("integer_weight", codes)
    owner, name = (layer._of[0], layer.parameter) if isinstance(layer, QuantOwnWeight) else (layer, "weight")
    placeholder = torch.zeros((), dtype=layer.weight.dtype).expand(layer.weight.shape)
    if isinstance(layer, QuantProjection):
        layer.register_buffer("placeholder", placeholder, persistent=False)
    else:
        delattr(owner, name)
        owner.register_buffer(name, placeholder, persistent=False)


def _drop_projected_weights(module: nn.Module) -> None:
    """Remove the weights from PyTorch's attention if all three of its projections have codes."""
    projections = [layer for layer in module.children() if isinstance(layer, IntegerProjection)]
    if projections and all("integer_weight" in layer._modules for layer in projections):
        _settle(module)
        for name in ("in_proj_weight", *(f"{layer.letter}_proj_weight" for layer in projections)):
            module.register_parameter(name, None)
