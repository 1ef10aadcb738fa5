"""Trace one batch: which layers a model calls, how often, in which order, with inputs of which sign; and all products.

A forward pass in eval mode is observed call by call. A second pass goes as in training, for what happens only there and
for the signs, which take both passes into account.

Whether a tensor "cannot be negative" is decided by structure. A tag starts at functions such as ReLU or sigmoid, and is
passed on by functions that preserve it (pooling, reshaping, sums of tagged tensors). Values decide only where structure
knows nothing, for the model's own inputs. So the average-pooled output of a hardswish is signed even if it happens to
be positive in this batch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from qat_runner.insertion.layers import (
    each,
    full_precision_name,
    is_quantized,
    kind_of,
    kinds,
    operands,
    quantizer_of,
    takes_hooks,
)
from qat_runner.insertion.modes import eval_without_trace, training_paths_without_trace
from qat_runner.insertion.naming import merged_notes
from qat_runner.insertion.products import Product, Products
from qat_runner.insertion.tensors import copies, samples_in
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.policy import EXPERTS
from qat_runner.quant.tensors import transformed

_STARTS = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square", "exp"}
# fmt: off
_KEEPS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "flatten", "unflatten", "reshape", "view", "permute", "transpose",
    "contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "double", "type", "cpu", "cuda", "getitem",
    "squeeze", "unsqueeze", "expand", "repeat", "cat", "concat", "stack", "chunk", "split", "add", "iadd", "radd",
    "mul", "imul", "rmul", "div", "truediv", "itruediv", "mean", "sum", "amax", "max", "maximum", "interpolate",
    "pixel_shuffle", "channel_shuffle", "pad",
}
# fmt: on
_CLAMPS = {"hardtanh", "clamp", "clip", "clamp_min"}
_IN_PLACE = {"iadd", "imul", "isub", "itruediv"}
_ARITHMETIC = {"add", "iadd", "radd", "mul", "imul", "rmul", "div", "truediv", "itruediv"}


@dataclass
class LayerCalls:
    """What was observed for one layer, or for one product."""

    name: str
    module: nn.Module
    calls: int = 0
    signed: dict[str, bool] = field(default_factory=dict)
    """operand other than the weight -> whether it may be negative"""
    by_values: set[str] = field(default_factory=set)
    """operands that structure shows not to be negative only if the model's own inputs never are, as in this batch"""
    nonfinite: set[str] = field(default_factory=set)
    """operands that contain NaN or infinity"""
    elements: dict[str, int] = field(default_factory=dict)
    """operand -> elements of the largest one seen, for one sample"""
    mixed: set[str] = field(default_factory=set)
    """operands whose first dimension is not that of samples alone, but has the tokens, windows or heads of all
    samples"""
    asked: bool = False
    """whether any of its quantizers was called"""
    training_only: bool = False
    """whether it is not called in eval mode"""


@dataclass
class Trace:
    """What was observed for a model."""

    layers: dict[str, LayerCalls] = field(default_factory=dict)
    """by name, in the order of the first call"""
    notes: list[str] = field(default_factory=list)
    """what quantization would pass over or get wrong, one sentence each"""
    products: list[Product] = field(default_factory=list)
    """all products, including those of the layers"""
    output: Any = None
    """output of the forward pass in eval mode"""


class _Signs(TorchFunctionMode):
    """A mode that passes the "cannot be negative" tag on."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.tags = WeakTensorKeyDictionary()  # tensor -> True if it cannot be negative
        self._by_values = WeakTensorKeyDictionary()  # tensor -> True if its tag relies on the values of the inputs
        for t in _flatten(inputs)[0]:
            self.tags[t] = t.is_floating_point() and shows_values(t) and bool((t >= 0).all())
            self._by_values[t] = True

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        raw_name = getattr(func, "__name__", "")
        name = raw_name.strip("_")
        out = func(*args, **kwargs)
        outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        nonnegative = self._nonnegative(name, args, kwargs)
        in_place = name == "setitem" or (raw_name.endswith("_") and not raw_name.startswith("__")) or name in _IN_PLACE
        if in_place and args and isinstance(args[0], Tensor) and not nonnegative:
            self._untag_storage(args[0])
        relies = nonnegative and name not in _STARTS | _CLAMPS and self._relies_on_values(args, kwargs)
        for t in outputs:
            self.tags[t], self._by_values[t] = nonnegative, relies
        return out

    def is_tagged(self, t: Tensor) -> bool:
        """Whether structure shows that t cannot be negative."""
        return bool(self.tags.get(t, False))

    def is_by_values(self, t: Tensor) -> bool:
        """Whether structure shows that t cannot be negative only because the inputs of the model are not."""
        return self.is_tagged(t) and bool(self._by_values.get(t, False))

    def _relies_on_values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return any(map(self.is_by_values, _flatten([*args, *kwargs.values()])[0]))

    def _untag_storage(self, changed: Tensor) -> None:
        """Remove the tag of all tensors that share memory with a changed one: it may have been a view."""
        memory = _memory(changed)
        for t in list(self.tags):
            if _memory(t) == memory:
                self.tags[t] = False

    def _nonnegative(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name in _STARTS:
            return True
        if name in _CLAMPS:
            low = kwargs.get("min_val", kwargs.get("min", args[1] if len(args) > 1 else None))
            return isinstance(low, int | float) and low >= 0
        if name == "masked_fill":
            value = kwargs.get("value", args[2] if len(args) > 2 else None)
            return self.is_tagged(args[0]) and isinstance(value, int | float) and value >= 0
        if name not in _KEEPS:
            return False
        if name == "interpolate" and "cubic" in str([*args, *kwargs.values()]):  # may go below zero
            return False
        if name == "pad" and (kwargs.get("value", args[3] if len(args) > 3 else None) or 0) < 0:
            return False
        tensors, numbers = _flatten([*args, *kwargs.values()])
        factors = numbers if name in _ARITHMETIC else []
        return bool(tensors) and all(map(self.is_tagged, tensors)) and all(n >= 0 for n in factors)


def shows_values(t: Tensor) -> bool:
    """Whether the values of a tensor can be compared with a number; those of sparse and nested ones cannot."""
    unlike_numbers = t.is_meta or t.is_complex() or t.is_nested or t.layout is not torch.strided
    return not unlike_numbers and t.numel() > 0


def _memory(t: Tensor) -> int:
    """Return the address of a tensor's memory; a key of its own for a sparse tensor, which has several."""
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else -id(t)


def _flatten(values: Any) -> tuple[list[Tensor], list[float]]:
    """Return the tensors and the numbers in nested tuples, lists and dicts."""
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
    """Run one batch through the model and report its layers and its products.

    The model is left unchanged: training flags, buffers and random generators are restored. The inputs are left
    unchanged as well: each of the two passes gets a copy.

    Args:
        model: any module; of DistributedDataParallel, DataParallel or torch.compile, the network inside is traced.
        *inputs, **named_inputs: the arguments of its forward, a real batch: its values decide whether the model's own
            input is signed. An input without values, on the meta device or empty, counts as signed.

    Returns:
        The layers that were called, the products of tensors, and notes on what cannot be quantized.
    """
    model = unwrapped(model)
    names = {module: name for name, module in each(model, lambda m: is_quantized(m) or _is_layer(m))}
    given = [*inputs, *named_inputs.values()]

    def run() -> Any:
        args, kwargs = copies((inputs, named_inputs))
        return model(*args, **kwargs)

    with _Calls(model, names, _Signs(given), samples_in(given)) as calls:
        with eval_without_trace(model), calls.watched():
            output = run()
        found = calls.products.found.copy()
        calls.training_only, failed = True, None
        try:
            with training_paths_without_trace(model), calls.watched():
                run()
        except Exception as error:  # it may need more than it is given, such as targets
            failed = error
    return Trace(
        {layer.name: layer for layer in calls.layers.values()},
        _notes(calls.layers, names, failed),
        [Product(*key, macs) for key, macs in found.items()]
        + [Product(*key, macs, training=True) for key, macs in _only_in(calls.products.found, found).items()],
        output,
    )


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer whose input could be quantized."""
    return type(module) in kinds() and not isinstance(module, nn.Embedding)


def _only_in(
    both: Counter[tuple[str, str, str]], first: Counter[tuple[str, str, str]]
) -> dict[tuple[str, str, str], int]:
    """Return what the second of two passes computed beyond the first.

    Args:
        both: what both passes together computed.
        first: what the first pass computed.
    """
    extra = {key: macs - 2 * first[key] for key, macs in both.items()}
    return {key: macs for key, macs in extra.items() if key not in first or macs > 0}


def _notes(
    layers: Mapping[nn.Module, LayerCalls], names: Mapping[nn.Module, str], failed: Exception | None
) -> list[str]:
    said = [
        (la.name, f"is called {la.calls} times per pass: one input quantizer serves all calls")
        for la in layers.values()
        if la.calls > 1 and kind_of(la.module) != EXPERTS
    ]
    said += [(la.name, "is called in training only") for la in layers.values() if la.training_only]
    said += [
        (la.name, "is called, but does not call its quantizers: nothing in it is quantized")
        for la in layers.values()
        if is_quantized(la.module) and operands(la.module) and not la.asked
    ]
    never = "is not called: it keeps its quantizers, but they see no data"
    notes = merged_notes([*said, *((name, never) for m, name in names.items() if m not in layers)])
    if failed is not None:
        why = " ".join(f"{type(failed).__name__}: {failed}".split())
        notes.append(
            f"what is computed only in training was not traced, since the example is not sufficient for it ({why})"
        )
    return notes


class _Calls:
    """Observe what modules of a model are called with, and what they multiply, while open.

    Args:
        model: the one whose modules are observed.
        names: names of the layers of interest.
        signs: knows which tensors cannot be negative.
        samples: number of samples in the batch.
    """

    def __init__(self, model: nn.Module, names: Mapping[nn.Module, str], signs: _Signs, samples: int) -> None:
        self.names, self.signs, self.samples = names, signs, samples
        self.layers: dict[nn.Module, LayerCalls] = {}
        self.training_only = False
        self.products = Products(self._owner)
        self._model = model
        self._owners: list[tuple[str, str]] = [("", type(model).__name__)]
        """the modules that are being called, outermost first"""
        self._past_hooks: tuple[str, str] | None = None
        """a layer whose forward was called directly, past its hooks, which only the calls of its quantizers reveal"""
        self._handles: list[Any] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context manager under which a forward pass is observed."""
        del self._owners[1:]  # a failed pass leaves entries behind
        with self.signs, self.products:
            yield

    def __enter__(self) -> "_Calls":
        for name, module in self._model.named_modules():
            if not takes_hooks(module):
                continue
            owner = name, kind_of(module) if is_quantized(module) else full_precision_name(module)
            self._handles += [
                module.register_forward_pre_hook(lambda m, a, owner=owner: self._owners.append(owner)),
                module.register_forward_hook(lambda m, a, out: self._leave()),
            ]
        for module in self.names:
            self._handles.append(module.register_forward_pre_hook(self._called))
            if not is_quantized(module):
                self._handles.append(module.register_forward_pre_hook(partial(self._look, module, "input")))
                continue
            for operand in operands(module):
                asked = partial(self._asked, module)
                look = asked if operand == "weight" else partial(self._look, module, operand)
                self._handles.append(quantizer_of(module, operand).register_forward_pre_hook(look))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _owner(self) -> tuple[str, str]:
        """Return the module that computes the present product."""
        found, self._past_hooks = self._past_hooks or self._owners[-1], None
        return found

    def _leave(self) -> None:
        self._owners.pop()

    def _seen(self, module: nn.Module) -> LayerCalls:
        new = LayerCalls(self.names[module], module, training_only=self.training_only)
        return self.layers.setdefault(module, new)

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        layer = self._seen(module)
        layer.calls += layer.training_only == self.training_only  # calls seen in eval mode are not counted again

    def _asked(self, module: nn.Module, given: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module in self.layers:
            self.layers[module].asked = True
        owner = self.names[module], kind_of(module)
        if owner not in self._owners:
            self._past_hooks = owner

    def _look(self, module: nn.Module, operand: str, given: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not args:
            return
        layer, x = self._seen(module), args[0]  # new if its forward was called past its hooks
        layer.asked = True
        # Values only ever overrule structure towards signed, in case structure was wrong. In training values alone
        # decide: a nonnegative tensor may be multiplied by random numbers there, in ways that structure does not know.
        shown = shows_values(x) and not transformed()
        negative = shown and bool((x < 0).any())
        if shown and not x.isfinite().all():
            layer.nonfinite.add(operand)
        if layer.training_only == self.training_only:
            negative = negative or not self.signs.is_tagged(x)
            if self.signs.is_by_values(x):
                layer.by_values.add(operand)
        layer.signed[operand] = layer.signed.get(operand, False) or negative
        if layer.training_only == self.training_only:
            samples = self._samples_in(x)
            layer.elements[operand] = max(layer.elements.get(operand, 0), x.numel() // samples)
            if samples != x.shape[0]:
                layer.mixed.add(operand)

    def _samples_in(self, x: Tensor) -> int:
        """Return how many samples a tensor holds; its first dimension may combine them with heads, windows or steps."""
        every = x.shape[0] > 1 and self.samples > 0 and x.numel() % self.samples == 0
        return self.samples if every else max(x.shape[0], 1)
