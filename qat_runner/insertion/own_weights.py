"""Modules that multiply by parameters of their own, as mixtures of experts do: each such product becomes a layer.

A mixture keeps the weights of all experts in one parameter, [E, K, C] or [E, C, K], and multiplies by all of it, by
slices of it, or by a gathered selection, with various functions. The module keeps its code. Its class is swapped for
one that runs the same forward while a mode sees its calls of torch functions, before PyTorch executes them. The
parameter is quantized once per forward pass, at its first use. What is made from it by moving elements is marked, so
that it is recognized later. Whatever the parameter, or a marked tensor, is multiplied by is quantized as an input.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat_runner.insertion.calls import Call, Compute, parse_call
from qat_runner.insertion.layers import (
    QuantLayer,
    Swapped,
    Taking,
    belong,
    full_precision_name,
    moved,
    quantized_class,
    restore,
    token_dim,
)
from qat_runner.policy import EXPERTS
from qat_runner.quant import Quantizer
from qat_runner.quant.recompute import Quantized, Source, can_be_made, recomputing, remade, saving

_NAMES = (
    *("__getitem__", "select", "narrow", "index_select", "gather", "take_along_dim", "chunk", "split", "tensor_split"),
    *("unbind", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "view"),
    *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone", "detach", "to"),
    *("float", "double", "half", "bfloat16", "cpu", "cuda"),
)

MOVES = frozenset(
    [getattr(place, name) for name in _NAMES for place in (torch, Tensor) if hasattr(place, name)]
    + [Tensor.T.__get__, Tensor.mT.__get__]  # type: ignore[attr-defined]
)
"""Functions that move or convert elements of their first argument, and compute nothing."""

MADE_OF = "_qat_made_of"
"""Attribute of a tensor that one of MOVES made from a parameter: from which one."""


def mark(part: Tensor, source: Tensor, made_of: object) -> None:
    """Note what a tensor is made from, unless it is the source itself, which a conversion may return."""
    if part is not source:
        setattr(part, MADE_OF, made_of)


def parts(out: Any) -> Sequence[Tensor]:
    """Return the tensors that one of MOVES returned."""
    return out if isinstance(out, tuple | list) else (out,)


class Used(NamedTuple):
    """What a module multiplies by in place of a parameter."""

    weight: Tensor
    source: Source | None = None
    """what it can be recomputed from; None: it is kept for the backward pass"""


class OwnWeight(nn.Module):
    """The products of a module with a parameter of its own: a linear layer, or one for each expert.

    Args:
        of: that module.
        parameter: its name in the module; of shape [K, C], [..., K, C], or transposed, [..., C, K].
        contracted: the dimension C of the parameter, -1 or -2, that products sum over.
    """

    def __init__(self, of: nn.Module, parameter: str, contracted: int) -> None:
        super().__init__()
        self._of, self.parameter, self.contracted = (of,), parameter, contracted  # in a tuple: not a submodule

    @property
    def weight(self) -> Any:
        """The parameter."""
        return getattr(self._of[0], self.parameter)

    def token_dim(self, summed: int | None) -> int:
        """Return the dimension of an input that must become its last, given the one that a product sums over."""
        return -1

    def used(self) -> Used:
        """Return what the module multiplies by, in the shape of the parameter."""
        raise NotImplementedError


def as_rows(weight: Tensor, turned: bool, rows: int) -> Tensor:
    """Reshape matrices [..., K, C], or transposed ones, [..., C, K], to [rows, elements of a row].

    A row is one of the K rows of a matrix, or a whole matrix.
    """
    return (weight.mT if turned else weight).reshape(rows, -1)


def from_rows(rows: Tensor, turned: bool, shape: Sequence[int]) -> Tensor:
    """Undo `as_rows` for a tensor of some shape."""
    return rows.view(*shape[:-2], shape[-1], shape[-2]).mT.contiguous() if turned else rows.view(shape)


@dataclass(frozen=True)
class _Rows(Source):
    """The source of rows: x is the weight."""

    turned: bool
    rows: int

    def made(self, first: int, last: int) -> tuple[Tensor, int]:
        return as_rows(self.x, self.turned, self.rows), 0


@dataclass(frozen=True)
class _Experts(Quantized):
    """The source of a quantized weight, recomputed by whole experts.

    x is the weight; s is [rows, 1], or [2, rows, 1] for a format with two clipping bounds.
    """

    turned: bool

    def made(self, first: int, last: int) -> tuple[Tensor, int]:
        experts = self.x.reshape(-1, *self.x.shape[-2:])
        size = experts[0].numel()
        begin, end = first // size, -(-last // size)
        s = self.s.unflatten(-2, (len(experts), -1))[..., begin:end, :, :].flatten(-3, -2)
        part = experts[begin:end]
        quantized = self.by.quantized(as_rows(part, self.turned, s.shape[-2]), s)
        return from_rows(quantized, self.turned, part.shape), begin * size


class QuantOwnWeight(OwnWeight, QuantLayer):
    """A quantized OwnWeight. One quantizer serves the inputs of all experts.

    The weight of an expert has one clipping scalar, or one per output channel. Its quantizer is given rows that have
    one scalar each.
    """

    def __init__(self, of: nn.Module, parameter: str, contracted: int) -> None:
        super().__init__(of, parameter, contracted)
        self.qat_kind_name = EXPERTS if self.weight.ndim > 2 else "Linear"
        self.weight_quantizer, self.input_quantizer = nn.Identity(), nn.Identity()

    def qat_stored_weight(self) -> nn.Parameter:
        stored: nn.Parameter = self.weight
        return stored

    def qat_scalar_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = self.weight.shape
        experts, channels = shape[:-2].numel(), shape[-3 - self.contracted]
        return {"tensor": (experts, 1) if len(shape) > 2 else (), "channel": (experts * channels, 1)}

    def token_dim(self, summed: int | None) -> int:
        return token_dim(self.input_quantizer, summed)

    @property
    def turned(self) -> bool:
        """Whether channels with a scalar each are columns, so that the parameter is transposed for its quantizer."""
        return self.contracted == -2 and self._scalars == self.qat_scalar_shapes()["channel"][0]

    @property
    def _scalars(self) -> int | None:
        """How many clipping scalars the weight has; None: a single one, or none."""
        quantizer = self.weight_quantizer
        several = isinstance(quantizer, Quantizer) and quantizer.dim is not None
        return quantizer.s.shape[-2] if several else None  # type: ignore[return-value, index]

    def qat_used_parameter(self) -> nn.Parameter | None:
        return self.qat_stored_weight() if self._scalars is None else None

    def qat_used_weight(self) -> Tensor:
        """Return the weight as it is quantized: with several scalars it is in rows, [scalars, elements of a row]."""
        weight: Tensor = self.weight
        return weight if self._scalars is None else as_rows(weight, self.turned, self._scalars)

    def used(self) -> Used:
        weight, rows, turned = self.qat_stored_weight(), self.qat_used_weight(), self.turned
        again: AbstractContextManager[object] = nullcontext()
        if turned and saving():
            again = remade(rows, _Rows(weight.detach(), weight._version, turned, len(rows)))
        with again:
            quantized: Tensor = self.weight_quantizer(rows)
        if quantized is rows:
            return Used(weight)
        used = from_rows(quantized, turned, weight.shape)
        return Used(used, self._source(quantized, rows, used.stride()))

    def _source(self, quantized: Tensor, rows: Tensor, stride: tuple[int, ...]) -> Source | None:
        quantizer, weight = self.weight_quantizer, self.qat_stored_weight()
        if not (isinstance(quantizer, Quantizer) and saving() and can_be_made(quantized, rows, quantizer)):
            return None
        how = weight.detach(), weight._version, quantizer.latest(), quantizer, stride
        return Quantized(*how) if self._scalars is None else _Experts(*how, self.turned)

    def forward(self, input: Tensor, weight: Tensor, compute: Compute, used: Used) -> Tensor:
        """Return what `compute` makes of an input and of what is `used`, or a part of it."""
        x = self.input_quantizer(input)
        parts = None if used.source is None else (used.weight, used.source)
        with recomputing((x, input, self.input_quantizer), parts=parts):
            return compute(x, weight)


class UsingOwnWeights(Swapped):
    """A module whose own forward runs with quantized products with its own parameters."""

    def qat_added(self) -> Sequence[str]:
        return [name for name, inner in self.named_children() if isinstance(inner, OwnWeight)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Taking(self, _Pass(self)):
            return super().forward(*args, **kwargs)


class _Pass:
    """One forward pass of such a module: takes over what it does with its parameters."""

    def __init__(self, module: nn.Module) -> None:
        layers = [m for m in module.children() if isinstance(m, OwnWeight)]
        for layer in layers:
            belong(layer, module)
        self._layers = [(layer.weight, layer) for layer in layers]
        for parameter, layer in self._layers:
            if layer.weight is not parameter:
                raise RuntimeError(
                    f"{layer.parameter} of a quantized {full_precision_name(module)} is now recomputed at each use: "
                    f"parametrize it before it is quantized"
                )
        self._used: dict[str, Used] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func in MOVES:
            layer = self._layer_of(args[0]) if args else None
            return NotImplemented if layer is None else self._move(layer, func, args, kwargs)
        call = parse_call(func, args, kwargs)
        return NotImplemented if call is None else self._product(call)

    def _move(self, layer: OwnWeight, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = func(self._in_place_of(args[0], layer), *args[1:], **kwargs)
        for part in parts(out):
            mark(part, args[0], layer)
        return out

    def _product(self, call: Call) -> Any:
        left, right = self._layer_of(call.left), self._layer_of(call.right)
        if (left is None) == (right is None):
            return NotImplemented
        layer, weight, input = (left, call.left, call.right) if right is None else (right, call.right, call.left)
        assert layer is not None
        dim = layer.token_dim(None if call.summed is None else call.summed[1 if right is None else 0])
        compute = partial(_computed, call.compute, dim, right is None)
        return layer(moved(input, dim, -1), self._in_place_of(weight, layer), compute, self._used_of(layer))

    def _layer_of(self, t: Any) -> OwnWeight | None:
        """Return the layer whose weight a tensor is or is made from."""
        for parameter, layer in self._layers:
            if t is parameter or getattr(t, MADE_OF, None) is layer:
                return layer
        return None

    def _in_place_of(self, t: Tensor, layer: OwnWeight) -> Tensor:
        """Return what is used in place of a parameter; anything else is returned as it is."""
        return self._used_of(layer).weight if t is layer.weight else t

    def _used_of(self, layer: OwnWeight) -> Used:
        if layer.parameter not in self._used:
            self._used[layer.parameter] = layer.used()
        return self._used[layer.parameter]


def _computed(compute: Compute, dim: int, weight_first: bool, input: Tensor, weight: Tensor) -> Tensor:
    """Compute a product of an input, whose dimension `dim` was moved to the end, and a weight."""
    input = moved(input, -1, dim)
    return compute(weight, input) if weight_first else compute(input, weight)


def layer_name(parameter: str) -> str:
    """Return the name of the layer, in a module, that quantizes the products with a parameter of the module."""
    return f"{parameter}_product"


def quantize_own_weights(module: nn.Module, contracted: Mapping[str, int]) -> None:
    """Make the products of a module with its own parameters layers, without quantizers, in place.

    `restore` undoes it.

    Args:
        module: of any class that was not swapped.
        contracted: name of a parameter -> its summed dimension, as in `OwnWeight`.
    """
    for name, dim in contracted.items():
        module.add_module(layer_name(name), QuantOwnWeight(module, name, dim).train(module.training))
    module.__class__ = quantized_class(type(module), UsingOwnWeights)


def release_own_weights(module: nn.Module) -> None:
    """Undo the conversion of whatever is not quantized in a module, once quantizers were added."""
    assert isinstance(module, UsingOwnWeights)
    for name in module.qat_added():
        if not any(isinstance(inner, Quantizer) for inner in module.get_submodule(name).children()):
            delattr(module, name)
    if not module.qat_added():
        restore(module)
