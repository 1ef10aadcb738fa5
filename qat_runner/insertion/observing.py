"""Observe which multiplications each module's own forward requests from PyTorch, and decide what can be quantized.

One batch runs through the model while it has no quantizers. Meanwhile a `TorchFunctionMode` sees every call of a torch
function, and a `TorchDispatchMode` (`Products`) counts every product that is executed. Each call is attributed to the
innermost module whose forward is running. The functions below use this record to decide whether a layer with a forward
of its own multiplies exactly once by its weight, whether a module computes attention, and by which of its own
parameters a module multiplies.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from qat_runner.insertion.calls import ATTENTION, MATRICES, Call, parse_call
from qat_runner.insertion.layers import (
    UNSWAPPABLE,
    in_own_function,
    is_own,
    is_plain,
    own_call,
    reading_weight,
    takes_hooks,
    weight_shape,
    weight_used,
)
from qat_runner.insertion.modes import (
    Inputs,
    call_with_copies,
    contents,
    eval_without_trace,
    explaining_argument_errors,
    training_paths_without_trace,
)
from qat_runner.insertion.own_products import PRODUCTS, names_are_free
from qat_runner.insertion.own_weights import MADE_OF, MOVES, layer_name, mark, parts
from qat_runner.insertion.products import Products
from qat_runner.insertion.tensors import tensors_of
from qat_runner.insertion.unchanged import difference


class ObservedProduct(NamedTuple):
    """One call of a function that multiplies."""

    func: Any
    left: int
    """number of elements of the first factor"""
    right: torch.Size
    given: int
    """number of elements of the output"""
    computed: bool
    """whether both factors are floating-point tensors that the forward pass computed, neither parameters nor buffers"""
    parameter: str | None = None
    """name of the module's own parameter that one factor is, or is made from"""
    contracted: int | None = None
    """dimension of that parameter, -1 or -2, that the product sums over; None if it sums over another one, or if the
    other factor is not a floating-point tensor that the forward pass computed"""


_WRITTEN_OUT = (ATTENTION, F.multi_head_attention_forward)
"""Functions that are decomposed into separate products where these are quantized."""

_CAUGHT = (*MATRICES, *_WRITTEN_OUT)
"""Functions whose calls are taken over in the forward of an attention module."""

_OTHER = ObservedProduct(None, 0, torch.Size(), 0, False)
"""Placeholder for products of a module that did not come from any of the known calls."""


@dataclass
class ObservedProducts:
    """Record of what the modules of a network asked PyTorch to multiply."""

    calls: dict[nn.Module, list[list[ObservedProduct]]] = field(default_factory=dict)
    """module -> for each of its calls, what its own forward requested"""
    otherwise: set[tuple[nn.Module, str]] = field(default_factory=set)
    """parameters, as (module, name), that are used for anything besides multiplying by them"""
    within: set[nn.Module] = field(default_factory=set)
    """modules that were called again while their own forward was still running"""
    weights: dict[nn.Module, tuple[Tensor, bool]] = field(default_factory=dict)
    """layer with a forward of its own -> the first weight it multiplied by, and whether it was in train mode then"""

    def copy(self) -> "ObservedProducts":
        """Return a copy of the present state."""
        calls = {module: [*calls] for module, calls in self.calls.items()}
        return ObservedProducts(calls, {*self.otherwise}, {*self.within}, {**self.weights})


@torch.no_grad()
def observe(model: nn.Module, inputs: Inputs) -> tuple[ObservedProducts, Any]:
    """Run one batch through a model without quantizers, first in eval mode and then as in training.

    Args:
        model: left unchanged.
        inputs: of its forward; each pass gets a copy. If they are not sufficient for training, what the model
            computes only in training is not seen.

    Returns:
        The record, and what the model returned in eval mode: now, if it initialized itself as in training.
    """
    kept = {id(t) for t in (*model.parameters(), *model.buffers())}
    with _Watch(kept) as watch, watch.products, watch.hooked(model):
        with eval_without_trace(model), explaining_argument_errors(model, inputs):
            output = call_with_copies(model, inputs)
        watch.given_away(output)
        asking, before = watch.asking.copy(), contents(model)
        try:
            with training_paths_without_trace(model):
                watch.given_away(call_with_copies(model, inputs))
            asking = watch.asking
        except Exception:  # trace() reports it
            pass
    if contents(model) != before:
        with eval_without_trace(model):
            output = call_with_copies(model, inputs)
    return asking, output


def multiplies_by_its_weight(layer: nn.Module, asking: ObservedProducts) -> bool:
    """Whether a layer computes exactly one product in each call, with a weight of the shape of its `weight`.

    Modules inside the layer may request other products, but none that could be mistaken for the layer's own. In
    addition, the layer must use the same weight without the example input, because the weight is also needed between
    calls.
    """
    with reading_weight(layer):
        shape: torch.Size = layer.weight.shape  # type: ignore[assignment]
    calls, of = asking.calls.get(layer, []), type(layer)
    return (
        bool(calls)
        and layer not in asking.within
        and all(
            len(asked) == 1 and is_own(of, asked[0].func) and weight_shape(of, asked[0].func, asked[0].right) == shape
            for asked in calls
        )
        and not any(_may_be_own(of, a) for m in _inside(layer) for asked in asking.calls.get(m, []) for a in asked)
        and _is_found_again(layer, asking)
    )


def _inside(layer: nn.Module) -> set[nn.Module]:
    """Return the modules inside a layer, except those that compute its weight: these run before its forward does."""
    makers: set[nn.Module] = {*layer.parametrizations.modules()} if is_parametrized(layer) else set()  # type: ignore[union-attr]
    return {*layer.modules()} - makers - {layer}


def _may_be_own(of: type[nn.Module], asked: ObservedProduct) -> bool:
    """Whether a product requested inside a layer may reach PyTorch as a call by which that layer multiplies.

    Fused attention counts as well, since it is decomposed into matrix products where it is quantized.
    """
    return is_own(of, asked.func) or (is_own(of, torch.matmul) and asked.func in _WRITTEN_OUT)


@torch.no_grad()
def _is_found_again(layer: nn.Module, asking: ObservedProducts) -> bool:
    """Whether a layer multiplies an input of the smallest size by the same weight as it multiplied the example by."""
    weight, training = asking.weights[layer]
    try:
        with training_paths_without_trace(layer) if training else eval_without_trace(layer):
            again = weight_used(layer, type(layer))
    except Exception:  # its forward may raise anything for such an input
        return False
    floats = weight.is_floating_point() or weight.is_complex()
    return difference([weight], [again], 4 * torch.finfo(weight.dtype).eps if floats else 0) is None


def attends(module: nn.Module, asking: ObservedProducts) -> bool:
    """Whether a module computes attention in each call: one fused call of PyTorch's, or two products.

    Both factors of both products must have been computed. The first factor of the second product (the probabilities)
    must have as many elements as the output of the first (the scores). Modules inside must not request such products
    themselves, since these would be mistaken for the module's own.
    """
    calls = asking.calls.get(module, [])
    inside = [inner for inner in module.modules() if inner is not module]
    return (
        bool(calls)
        and module not in asking.within
        and all(_is_attention([a for a in asked if a.func in _CAUGHT]) for asked in calls)
        and not any(a.func in _CAUGHT for m in inside for asked in asking.calls.get(m, []) for a in asked)
        and names_are_free(module)
        and not isinstance(module, UNSWAPPABLE)
    )


def own_weights(module: nn.Module, asking: ObservedProducts) -> dict[str, int]:
    """Return the parameters of its own that a module multiplies by: name -> the summed dimension, -1 or -2.

    A parameter must have two dimensions or more and be used in one way only, and the name of the layer that is added
    for it must be free. A module that calls itself has none: its products could belong to any of the calls in progress.
    """
    if module in asking.within:
        return {}
    found: dict[str, set[int | None]] = {}
    for asked in (a for calls in asking.calls.get(module, []) for a in calls if a.parameter is not None):
        found.setdefault(str(asked.parameter), set()).add(asked.contracted)
    alone = {
        name: dims
        for name, dims in found.items()
        if len(dims) == 1 and (module, name) not in asking.otherwise and not hasattr(module, layer_name(name))
    }
    return {name: dim for name, dims in alone.items() for dim in dims if dim is not None}


def _is_attention(asked: Sequence[ObservedProduct]) -> bool:
    if [a.func for a in asked] in ([fused] for fused in _WRITTEN_OUT):
        return True
    if len(asked) != len(PRODUCTS) or any(a.func in _WRITTEN_OUT for a in asked):
        return False
    first, second = asked
    return first.computed and second.computed and second.left == first.given


class _Made(NamedTuple):
    """What a tensor is made from."""

    module: nn.Module
    parameter: str
    places: tuple[Tensor, ...]
    """coordinates of its elements in the parameter: along the last dimension, and along the one before"""

    def along(self, dim: int) -> int | None:
        """Return which of these two, -1 or -2, a dimension of the tensor runs along; None if it is not exactly one."""
        last, before = (place.numel() > 0 and bool((place != place.narrow(dim, 0, 1)).any()) for place in self.places)
        return None if last == before else -1 if last else -2


def _places(parameter: Tensor) -> tuple[Tensor, ...]:
    rows, columns = parameter.shape[-2:]
    where = torch.device("cpu") if parameter.is_meta else parameter.device
    last, before = (torch.arange(n, dtype=torch.int32, device=where) for n in (columns, rows))
    return last.expand(parameter.shape), before[:, None].expand(parameter.shape)


def _with_numbers(value: Any) -> Any:
    """Return an argument of a call; an index on the meta device, which has no values, becomes zeros.

    The zeros choose the first of what can be chosen.
    """
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) and value.is_meta else value


def _is_of_its_kind(func: Any) -> bool:
    """Whether a function takes only the shape, dtype or device from its tensor argument, as `zeros_like` does."""
    name: str = getattr(func, "__name__", "")
    return name == "type_as" or name.startswith("new_") or name.endswith("_like")


@dataclass
class _Frame:
    """One call of a module that is in progress."""

    module: nn.Module
    asked: list[ObservedProduct] = field(default_factory=list)
    others: int = 0
    """number of products that do not belong to the calls in `asked`"""


class _Watch(TorchFunctionMode):
    """A mode that records the calls that multiply, by the module whose forward is running.

    `products` has to be open as well.
    """

    def __init__(self, kept: set[int]) -> None:
        super().__init__()
        self.asking = ObservedProducts()
        self.products = Products(self._counted)
        self._kept = kept
        self._open: list[_Frame] = []

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Context manager under which hooks report when the forward of each module begins and ends."""
        handles = []
        for module in filter(takes_hooks, model.modules()):
            handles.append(module.register_forward_pre_hook(lambda m, args: self._begin(m)))
            handles.append(module.register_forward_hook(lambda m, args, out: self._close()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def given_away(self, output: Any) -> None:
        """Mark the parameters that the network's output is made from as used otherwise."""
        for made in (getattr(t, MADE_OF, None) for t in tensors_of(output)):
            if made is not None:
                self.asking.otherwise.add((made.module, made.parameter))

    def _begin(self, module: nn.Module) -> None:
        if any(frame.module is module for frame in self._open):
            self.asking.within.add(module)
        self._open.append(_Frame(module))

    def _close(self) -> None:
        frame = self._open.pop()
        self.asking.calls.setdefault(frame.module, []).append([*frame.asked, *([_OTHER] if frame.others else [])])

    def _counted(self) -> tuple[str, str]:
        """Count one executed product for the running module; called by `Products`, which needs no owner here."""
        if self._open:
            self._open[-1].others += 1
        return "", ""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._open:
            return func(*args, **kwargs)
        frame = self._open[-1]
        others = frame.others
        out = func(*args, **kwargs)
        if self._note(frame, func, args, kwargs, out):
            frame.others = others  # the products that this call executed are accounted for
        return out

    def _note(self, frame: _Frame, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> bool:
        """Record a call; return whether it is one of those that can be taken over."""
        if func in MOVES and args:
            self._follow(func, args, kwargs, out)
            self._note_uses(frame, args[:1], moved=True)
            return False
        call = parse_call(func, args, kwargs)
        attention = func is ATTENTION or func is F.multi_head_attention_forward
        if not _is_of_its_kind(func) and any(isinstance(t, Tensor) for t in parts(out)):
            self._note_uses(frame, (args, kwargs), factors=() if call is None else call[:2])
        if (attention or call is not None) and in_own_function():
            self._note_uses(frame, (args, kwargs))
            return False
        if attention:
            frame.asked.append(ObservedProduct(func, 0, torch.Size(), 0, True))
        elif call is not None:
            made = self._made_of(call.left), self._made_of(call.right)
            computed = [
                t.is_floating_point() and id(t) not in self._kept and m is None
                for t, m in zip(call[:2], made, strict=True)
            ]
            self._note_weight(frame.module, func, args, kwargs)
            sizes = call.left.numel(), call.right.shape, out.numel()
            frame.asked.append(ObservedProduct(func, *sizes, all(computed), *self._own(call, made, computed)))
        return attention or call is not None

    def _note_weight(self, module: nn.Module, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Record the first weight that a layer multiplies by, if the layer has a forward of its own."""
        own = None if is_plain(type(module)) else own_call(type(module), func, args, kwargs)
        if own is not None:
            self.asking.weights.setdefault(module, (own.right, module.training))

    def _note_uses(self, frame: _Frame, given: Any, moved: bool = False, factors: Sequence[Tensor] = ()) -> None:
        """Mark parameters that a call uses as used otherwise.

        Those that the running module itself moves or multiplies by are excepted.
        """
        for t in (t for t in tensors_of(given) if t is not None):
            made = getattr(t, MADE_OF, None)
            multiplied = made is not None and made.module is frame.module and any(t is factor for factor in factors)
            if made is not None and not moved and not multiplied:
                self.asking.otherwise.add((made.module, made.parameter))
            for around in {f.module for f in self._open} - {frame.module}:
                self.asking.otherwise.update((around, name) for name, p in around._parameters.items() if p is t)

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record what a move makes from a parameter, by applying the same move to the coordinates of its elements."""
        made = self._made_of(args[0])
        if made is None:
            return
        move = Tensor.reshape if func is Tensor.view else func  # the coordinates are expanded, so `view` may fail
        more, named = tree_map(_with_numbers, (args[1:], kwargs))
        with suppress(Exception):  # such as a view with another dtype, which is not a move
            places = [parts(move(place, *more, **named)) for place in made.places]
            for part, *moved in zip(parts(out), *places, strict=True):
                mark(part, args[0], made._replace(places=tuple(moved)))

    def _own(
        self, call: Call, made: tuple[_Made | None, _Made | None], computed: Sequence[bool]
    ) -> tuple[str | None, int | None]:
        """Return the parameter of the running module that a call multiplies by, and its summed dimension."""
        for of, factor, other in ((made[0], 0, 1), (made[1], 1, 0)):
            if of is not None and of.module is self._open[-1].module:
                if computed[other] and call.summed is not None:
                    return of.parameter, of.along(call.summed[factor])
                return of.parameter, None
        return None, None

    def _made_of(self, t: Any) -> _Made | None:
        module = self._open[-1].module
        for name, parameter in module._parameters.items():
            if parameter is not None and t is parameter and t.ndim > 1 and t.is_floating_point():
                return _Made(module, name, _places(parameter))
        return getattr(t, MADE_OF, None)
