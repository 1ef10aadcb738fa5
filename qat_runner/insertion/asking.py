"""What each module's own forward asks PyTorch to multiply: which modules can be had to multiply what is quantized."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat_runner.insertion.calls import ATTENTION, MATRICES, taken_apart
from qat_runner.insertion.layers import is_own, weight_shape
from qat_runner.insertion.modes import evaluating, repeatable, taking_the_ways_of_training
from qat_runner.insertion.own_products import PRODUCTS


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


_CAUGHT = (*MATRICES, ATTENTION, F.multi_head_attention_forward)
"""Functions whose calls are taken over in the forward of an attention module."""

Asking = dict[nn.Module, list[list[Asked]]]
"""Module -> what it asked for itself, in each of its calls."""


@torch.no_grad()
def look(model: nn.Module, inputs: Sequence[Any]) -> tuple[Asking, Any]:
    """Run one batch through a model that has no quantizers, in eval mode and then as in training.

    Args:
        model: comes out as it went in.
        inputs: of its forward. What it computes in training alone is not seen if they do not suffice for that.

    Returns:
        What was asked for, and what the model returned in eval mode.
    """
    kept = {id(t) for t in (*model.parameters(), *model.buffers())}
    with _Watch(kept) as watch, watch.hooked(model):
        with evaluating(model), repeatable():
            output = model(*inputs)
        asked = {module: list(calls) for module, calls in watch.asked.items()}
        try:
            with taking_the_ways_of_training(model):
                model(*inputs)
            asked = watch.asked
        except Exception:  # trace() tells of it
            pass
    return asked, output


def multiplies_by_its_weight(layer: nn.Module, asking: Asking) -> bool:
    """Whether all that a layer asks for, in each call, is one product with a weight of the shape of its own."""
    weight: Any = layer.weight
    calls = asking.get(layer, [])
    return bool(calls) and all(
        len(asked) == 1
        and is_own(type(layer), asked[0].func)
        and weight_shape(type(layer), asked[0].func, asked[0].right) == weight.shape
        for asked in calls
    )


def attends(module: nn.Module, asking: Asking) -> bool:
    """Whether a module computes attention, in each call: one call of PyTorch's, or two products of what was computed.

    The second of two takes as many elements as the first gives: probabilities, of scores. What modules in it ask for
    must be known as well, since it would be mistaken for its own.
    """
    calls = asking.get(module, [])
    inside = [inner for inner in module.modules() if inner is not module]
    return (
        bool(calls)
        and all(_is_attention([a for a in asked if a.func in _CAUGHT]) for asked in calls)
        and not any(a.func in _CAUGHT for m in inside for asked in asking.get(m, []) for a in asked)
        and not any(hasattr(module, name) for name in PRODUCTS)
        and not isinstance(module, torch.jit.ScriptModule)
    )


def _is_attention(asked: Sequence[Asked]) -> bool:
    if [a.func for a in asked] == [ATTENTION]:
        return True
    if len(asked) != len(PRODUCTS) or any(a.func is ATTENTION for a in asked):
        return False
    first, second = asked
    return first.computed and second.computed and second.left == first.given


class _Watch(TorchFunctionMode):
    """While open, what is asked for is noted, by the module that is at work."""

    def __init__(self, kept: set[int]) -> None:
        super().__init__()
        self.asked: Asking = {}
        self._kept = kept
        self._open: list[tuple[nn.Module, list[Asked]]] = []

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """While open, modules tell when they are called."""
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(lambda m, args: self._open.append((m, []))))
            handles.append(module.register_forward_hook(lambda m, args, out: self._close()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _close(self) -> None:
        module, asked = self._open.pop()
        self.asked.setdefault(module, []).append(asked)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._open:
            if func is ATTENTION or func is F.multi_head_attention_forward:
                self._open[-1][1].append(Asked(func, 0, torch.Size(), 0, True))
            elif (call := taken_apart(func, args, kwargs)) is not None:
                computed = all(t.is_floating_point() and id(t) not in self._kept for t in call[:2])
                self._open[-1][1].append(Asked(func, call.left.numel(), call.right.shape, out.numel(), computed))
        return out
