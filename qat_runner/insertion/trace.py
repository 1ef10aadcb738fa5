"""What a model does with one batch: the layers it calls, how often, in which order, on inputs of which sign.

A forward pass in eval mode is watched call by call; and if that leaves layers uncalled, one that goes as in training.
"Cannot be negative" is a matter of structure: the tag starts at functions such as ReLU or sigmoid and passes through
those that keep it (pooling, reshaping, sums of tagged tensors). Values decide where structure knows nothing, at the
model's own inputs. So an average pooled from hardswish outputs is signed even if this one batch happens to be positive.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from qat_runner.insertion.layers import LAYERS, activations, each, is_quantized
from qat_runner.insertion.modes import evaluating, taking_the_ways_of_training

_STARTS = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square", "exp"}
# fmt: off
_KEEPS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "flatten", "unflatten", "reshape", "view", "permute", "transpose",
    "contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "double", "cpu", "cuda", "getitem", "squeeze",
    "unsqueeze", "expand", "repeat", "cat", "concat", "stack", "chunk", "split", "add", "iadd", "radd", "mul", "imul",
    "rmul", "div", "truediv", "itruediv", "mean", "sum", "amax", "max", "maximum", "interpolate", "pixel_shuffle",
    "channel_shuffle", "pad",
}
_PRODUCTS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear",
    "matmul", "rmatmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
    "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu",
}
# fmt: on
_IN_PLACE = {"iadd", "imul", "isub", "itruediv"}
_ARITHMETIC = {"add", "iadd", "radd", "mul", "imul", "rmul", "div", "truediv", "itruediv"}


@dataclass
class LayerCalls:
    """What was seen of one Conv2d or Linear layer, or of a quantized product."""

    name: str
    module: nn.Module
    calls: int = 0
    signed: dict[str, bool] = field(default_factory=dict)
    """operand, other than the weight -> whether it may be negative"""
    elements: dict[str, int] = field(default_factory=dict)
    """operand -> elements of the largest one seen, for one sample"""
    training_only: bool = False
    """not called in eval mode"""


@dataclass
class Trace:
    """What was seen of a model."""

    layers: dict[str, LayerCalls] = field(default_factory=dict)
    """by name, in order of the first call"""
    notes: list[str] = field(default_factory=list)
    """what quantization would pass over or get wrong, a sentence each"""


class _Watch(TorchFunctionMode):
    """Passes the "cannot be negative" tag on, and notes products computed outside of the known layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tags = WeakTensorKeyDictionary()  # tensor -> True if it cannot be negative
        self.inside: list[str] = []  # the layers being called
        self.owner: list[str] = []  # the modules being called, for naming
        self.products: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        raw_name = getattr(func, "__name__", "")
        name = raw_name.strip("_")
        out = func(*args, **kwargs)
        if name in _PRODUCTS and not self.inside:
            where = self.owner[-1] if self.owner else ""
            known = "Conv2d and Linear layers and the attention of transformers' networks"
            note = f"{name} called in {where or 'the model itself'} is not quantized: only {known} are"
            self.products[note] = None
        outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        nonnegative = self._nonnegative(name, args, kwargs)
        in_place = name == "setitem" or (raw_name.endswith("_") and not raw_name.startswith("__")) or name in _IN_PLACE
        if in_place and args and isinstance(args[0], Tensor) and not nonnegative:
            self._untag_storage(args[0])
        for t in outputs:
            self.tags[t] = nonnegative
        return out

    def is_tagged(self, t: Tensor) -> bool:
        """Whether structure says that t cannot be negative."""
        return bool(self.tags.get(t, False))

    def _untag_storage(self, changed: Tensor) -> None:
        """A view may have been written through: whatever shares its memory may be negative now."""
        memory = changed.untyped_storage().data_ptr()
        for t in list(self.tags):
            if t.untyped_storage().data_ptr() == memory:
                self.tags[t] = False

    def _nonnegative(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name in _STARTS:
            return True
        if name in ("hardtanh", "clamp", "clip", "clamp_min"):
            low = kwargs.get("min_val", kwargs.get("min", args[1] if len(args) > 1 else None))
            return isinstance(low, int | float) and low >= 0
        if name not in _KEEPS:
            return False
        if name == "interpolate" and "cubic" in str([*args, *kwargs.values()]):  # overshoots
            return False
        if name == "pad" and (kwargs.get("value", args[3] if len(args) > 3 else None) or 0) < 0:
            return False
        tensors, numbers = _flatten([*args, *kwargs.values()])
        factors = numbers if name in _ARITHMETIC else []
        return bool(tensors) and all(map(self.is_tagged, tensors)) and all(n >= 0 for n in factors)


def _flatten(values: Any) -> tuple[list[Tensor], list[float]]:
    """The tensors and the numbers in nested tuples, lists and dicts."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, int | float):
            numbers.append(value)
        elif isinstance(value, tuple | list | dict):
            more = _flatten(value.values() if isinstance(value, dict) else value)
            tensors += more[0]
            numbers += more[1]
    return tensors, numbers


@torch.no_grad()
def trace(model: nn.Module, *inputs: Any, **named_inputs: Any) -> Trace:
    """Run one batch through the model and report its layers.

    The model comes out as it went in: training flags and BatchNorm statistics are untouched.

    Args:
        model: any module.
        *inputs, **named_inputs: what its forward takes, a real batch: its values decide whether the model's own input
            is signed.

    Returns:
        The layers called, and notes on what cannot be quantized.
    """
    seen = Trace()
    watch = _Watch()
    names = {module: name for name, module in each(model, lambda m: type(m) in LAYERS or is_quantized(m))}
    found: dict[nn.Module, LayerCalls] = {}

    training_only = False

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = found.setdefault(module, LayerCalls(names[module], module, training_only=training_only))
        watch.inside.append(layer.name)
        if layer.training_only != training_only:
            return  # seen in eval mode already
        layer.calls += 1
        for operand, x in activations(module, args, kwargs).items():
            # Values only ever overrule structure towards signed, should it have been fooled.
            negative = not watch.is_tagged(x) or bool((x < 0).any())
            layer.signed[operand] = layer.signed.get(operand, False) or negative
            layer.elements[operand] = max(layer.elements.get(operand, 0), x.numel() // max(x.shape[0], 1))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        watch.inside.pop()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.owner.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        described = f"{name} ({type(module).__name__})" if name else ""
        handles.append(module.register_forward_pre_hook(lambda m, a, d=described: watch.owner.append(d)))
        handles.append(module.register_forward_hook(leave))
    for module in names:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    for t in _flatten([*inputs, *named_inputs.values()])[0]:
        watch.tags[t] = t.is_floating_point() and bool((t >= 0).all())
    try:
        with evaluating(model), watch:
            model(*inputs, **named_inputs)
        if len(found) < len(names):
            training_only = True
            # It may want more than it is given, targets say.
            with taking_the_ways_of_training(model), watch, suppress(Exception):
                model(*inputs, **named_inputs)
    finally:
        for handle in handles:
            handle.remove()

    seen.layers = {layer.name: layer for layer in found.values()}
    seen.notes += [
        f"{la.name} is called {la.calls} times a pass: one input quantizer serves them all"
        for la in found.values()
        if la.calls > 1
    ]
    seen.notes += [f"{la.name} is called in training only" for la in found.values() if la.training_only]
    seen.notes += [
        f"{name} is not called: it keeps its quantizers, but sees no data"
        for m, name in names.items()
        if m not in found
    ]
    seen.notes += list(watch.products)
    return seen
