"""What each module's own forward asks PyTorch to multiply: which modules can be had to multiply what is quantized."""

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

from qat_runner.insertion.calls import ATTENTION, MATRICES, Call, taken_apart
from qat_runner.insertion.layers import (
    OF_ITS_OWN_CLASS,
    in_own_function,
    is_own,
    is_plain,
    looked_at,
    own_call,
    takes_hooks,
    weight_shape,
    weight_used,
)
from qat_runner.insertion.modes import arguments_told, remembering_nothing, taking_the_ways_of_training
from qat_runner.insertion.own_products import PRODUCTS, has_room
from qat_runner.insertion.own_weights import MADE_OF, MOVES, layer_name, mark, parts
from qat_runner.insertion.products import Products
from qat_runner.insertion.tensors import copies, tensors_of
from qat_runner.insertion.unchanged import difference


class Asked(NamedTuple):
    """One call of a function that multiplies."""

    func: Any
    left: int
    """elements of the first factor"""
    right: torch.Size
    given: int
    """elements of what came out"""
    computed: bool
    """whether both factors are floating numbers that were computed, not parameters or buffers"""
    parameter: str | None = None
    """name of the module's own parameter that one factor is, or is made of"""
    contracted: int | None = None
    """the dimension of it, -1 or -2, that is added up over; None where that is another, or the other factor is no
    floating number that was computed"""


_WRITTEN_OUT = (ATTENTION, F.multi_head_attention_forward)
"""Functions that are written out as products where these are quantized."""

_CAUGHT = (*MATRICES, *_WRITTEN_OUT)
"""Functions whose calls are taken over in the forward of an attention module."""

_OTHER = Asked(None, 0, torch.Size(), 0, False)
"""Stands for products of a module that none of the calls that are known has asked for."""


@dataclass
class Asking:
    """What the modules of a network asked PyTorch to multiply."""

    calls: dict[nn.Module, list[list[Asked]]] = field(default_factory=dict)
    """module -> what it asked for itself, in each of its calls"""
    otherwise: set[tuple[nn.Module, str]] = field(default_factory=set)
    """parameters, by module and name, that the module does more with than to multiply by them"""
    within: set[nn.Module] = field(default_factory=set)
    """modules that were called while they were at work already"""
    weights: dict[nn.Module, tuple[Tensor, bool]] = field(default_factory=dict)
    """layer with a forward of its own -> the weight that it multiplied by first, and whether it was in train mode"""

    def copy(self) -> "Asking":
        """As it is now."""
        calls = {module: [*calls] for module, calls in self.calls.items()}
        return Asking(calls, {*self.otherwise}, {*self.within}, {**self.weights})


@torch.no_grad()
def look(model: nn.Module, inputs: Sequence[Any]) -> tuple[Asking, Any]:
    """Run one batch through a model that has no quantizers, in eval mode and then as in training.

    Args:
        model: comes out as it went in.
        inputs: of its forward; each pass gets a copy. What it computes in training alone is not seen if they do not
            suffice for that.

    Returns:
        What was asked for, and what the model returned in eval mode.
    """
    kept = {id(t) for t in (*model.parameters(), *model.buffers())}
    with _Watch(kept) as watch, watch.products, watch.hooked(model):
        with remembering_nothing(model), arguments_told(model, inputs):
            output = model(*copies(inputs))
        watch.given_away(output)
        asking = watch.asking.copy()
        try:
            with taking_the_ways_of_training(model):
                watch.given_away(model(*copies(inputs)))
            asking = watch.asking
        except Exception:  # trace() tells of it
            pass
    return asking, output


def multiplies_by_its_weight(layer: nn.Module, asking: Asking) -> bool:
    """Whether all that a layer computes, in each call, is one product with a weight of the shape of its own.

    Modules in it may ask for others, but not for such as would be mistaken for its own. And the weight must be there
    without an input, for whoever asks for it between two calls.
    """
    with looked_at(layer):
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
    """The modules in a layer but for those that make its weight, which are at work before its forward is."""
    makers: set[nn.Module] = {*layer.parametrizations.modules()} if is_parametrized(layer) else set()  # type: ignore[union-attr]
    return {*layer.modules()} - makers - {layer}


def _may_be_own(of: type[nn.Module], asked: Asked) -> bool:
    """Whether what a module in a layer of a class asks for may come to a call by which the layer multiplies: attention
    is written out where it is quantized."""
    return is_own(of, asked.func) or (is_own(of, torch.matmul) and asked.func in _WRITTEN_OUT)


@torch.no_grad()
def _is_found_again(layer: nn.Module, asking: Asking) -> bool:
    """Whether a layer multiplies an input of the smallest size by the weight that it multiplied the example by."""
    weight, training = asking.weights[layer]
    try:
        with taking_the_ways_of_training(layer) if training else remembering_nothing(layer):
            again = weight_used(layer, type(layer))
    except Exception:  # whatever its forward raises at such an input
        return False
    floats = weight.is_floating_point() or weight.is_complex()
    return difference([weight], [again], 4 * torch.finfo(weight.dtype).eps if floats else 0) is None


def attends(module: nn.Module, asking: Asking) -> bool:
    """Whether a module computes attention, in each call: one call of PyTorch's, or two products of what was computed.

    The second of two takes as many elements as the first gives: probabilities, of scores. What modules in it ask for
    must be known as well, since it would be mistaken for its own.
    """
    calls = asking.calls.get(module, [])
    inside = [inner for inner in module.modules() if inner is not module]
    return (
        bool(calls)
        and module not in asking.within
        and all(_is_attention([a for a in asked if a.func in _CAUGHT]) for asked in calls)
        and not any(a.func in _CAUGHT for m in inside for asked in asking.calls.get(m, []) for a in asked)
        and has_room(module)
        and not isinstance(module, OF_ITS_OWN_CLASS)
    )


def own_weights(module: nn.Module, asking: Asking) -> dict[str, int]:
    """The parameters of its own that a module multiplies by: name -> the dimension, -1 or -2, that it adds up over.

    Those of two dimensions or more that it uses in one way alone, and where a layer for that can be put beside them.
    Of a module that calls itself none: each product would be taken for one of all calls that are at work.
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


def _is_attention(asked: Sequence[Asked]) -> bool:
    if [a.func for a in asked] == [ATTENTION]:
        return True
    if len(asked) != len(PRODUCTS) or any(a.func is ATTENTION for a in asked):
        return False
    first, second = asked
    return first.computed and second.computed and second.left == first.given


class _Made(NamedTuple):
    """What a tensor is made of."""

    module: nn.Module
    parameter: str
    places: tuple[Tensor, ...]
    """where its elements lie along the last dimension of the parameter, and along the one before"""

    def along(self, dim: int) -> int | None:
        """The one of these two that a dimension of the tensor runs along."""
        last, before = (place.numel() > 0 and bool((place != place.narrow(dim, 0, 1)).any()) for place in self.places)
        return None if last == before else -1 if last else -2


def _places(parameter: Tensor) -> tuple[Tensor, ...]:
    rows, columns = parameter.shape[-2:]
    where = torch.device("cpu") if parameter.is_meta else parameter.device
    last, before = (torch.arange(n, dtype=torch.int32, device=where) for n in (columns, rows))
    return last.expand(parameter.shape), before[:, None].expand(parameter.shape)


def _with_numbers(value: Any) -> Any:
    """An argument of a call on the meta device, where an index has none: the first of what it chooses from."""
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) and value.is_meta else value


def _is_of_its_kind(func: Any) -> bool:
    """Whether a function makes a tensor that has of another one its shape, dtype or device alone."""
    name: str = getattr(func, "__name__", "")
    return name == "type_as" or name.startswith("new_") or name.endswith("_like")


@dataclass
class _Frame:
    """One call of a module."""

    module: nn.Module
    asked: list[Asked] = field(default_factory=list)
    others: int = 0
    """products beside those"""


class _Watch(TorchFunctionMode):
    """While open, and `products` with it, what is asked for is noted, by the module that is at work."""

    def __init__(self, kept: set[int]) -> None:
        super().__init__()
        self.asking = Asking()
        self.products = Products(self._counted)
        self._kept = kept
        self._open: list[_Frame] = []

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """While open, modules tell when they are called."""
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
        """Note the parameters that what the network returns is made of."""
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
        """There was a product."""
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
            frame.others = others  # what it came to is known
        return out

    def _note(self, frame: _Frame, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> bool:
        """Note a call; whether it is one of those that are taken over."""
        if func in MOVES and args:
            self._follow(func, args, kwargs, out)
            self._note_uses(frame, args[:1], moved=True)
            return False
        call = taken_apart(func, args, kwargs)
        attention = func is ATTENTION or func is F.multi_head_attention_forward
        if not _is_of_its_kind(func) and any(isinstance(t, Tensor) for t in parts(out)):
            self._note_uses(frame, (args, kwargs), factors=() if call is None else call[:2])
        if (attention or call is not None) and in_own_function():
            self._note_uses(frame, (args, kwargs))
            return False
        if attention:
            frame.asked.append(Asked(func, 0, torch.Size(), 0, True))
        elif call is not None:
            made = self._made_of(call.left), self._made_of(call.right)
            computed = [
                t.is_floating_point() and id(t) not in self._kept and m is None
                for t, m in zip(call[:2], made, strict=True)
            ]
            self._note_weight(frame.module, func, args, kwargs)
            sizes = call.left.numel(), call.right.shape, out.numel()
            frame.asked.append(Asked(func, *sizes, all(computed), *self._own(call, made, computed)))
        return attention or call is not None

    def _note_weight(self, module: nn.Module, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note what a layer multiplies by, where that has to be looked at."""
        own = None if is_plain(type(module)) else own_call(type(module), func, args, kwargs)
        if own is not None:
            self.asking.weights.setdefault(module, (own.right, module.training))

    def _note_uses(self, frame: _Frame, given: Any, moved: bool = False, factors: Sequence[Tensor] = ()) -> None:
        """Note the parameters that a call uses, but those that a module moves, and multiplies by, itself."""
        for t in (t for t in tensors_of(given) if t is not None):
            made = getattr(t, MADE_OF, None)
            multiplied = made is not None and made.module is frame.module and any(t is factor for factor in factors)
            if made is not None and not moved and not multiplied:
                self.asking.otherwise.add((made.module, made.parameter))
            for around in {f.module for f in self._open} - {frame.module}:
                self.asking.otherwise.update((around, name) for name, p in around._parameters.items() if p is t)

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what is made of parameters: what happens to them is done to the places of their elements."""
        made = self._made_of(args[0])
        if made is None:
            return
        move = Tensor.reshape if func is Tensor.view else func  # places take no memory, so they lie otherwise
        more, named = tree_map(_with_numbers, (args[1:], kwargs))
        with suppress(Exception):  # such as a view of another dtype, which is no move
            places = [parts(move(place, *more, **named)) for place in made.places]
            for part, *moved in zip(parts(out), *places, strict=True):
                mark(part, args[0], made._replace(places=tuple(moved)))

    def _own(
        self, call: Call, made: tuple[_Made | None, _Made | None], computed: Sequence[bool]
    ) -> tuple[str | None, int | None]:
        """The parameter of the module at work that a call multiplies by, and the dimension of it that is summed."""
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
