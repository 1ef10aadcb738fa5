"""Modes that a network is looked at in, and comes out of as it was."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_runner.quant import Quantizer


@contextmanager
def arguments_told(model: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """While open, a model that takes other arguments than these fails with a word on what they are to be."""
    try:
        yield
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*inputs)
        except TypeError:
            raise TypeError(f"{error}: a batch is the inputs alone, and a tuple the arguments of forward") from error
        raise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, all modules are in eval mode; afterwards each is in the mode that it was in."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def remembering_nothing(model: nn.Module) -> Iterator[None]:
    """While open, the network is in eval mode, and what it remembers even there is forgotten: buffers of its own
    modules and random generators come out as they went in."""
    with evaluating(model), _buffers_kept(_deciding(model)), repeatable():
        yield


@contextmanager
def taking_the_ways_of_training(model: nn.Module) -> Iterator[None]:
    """While open, the network computes what it computes in training (auxiliary heads, say), and remembers none of it.

    PyTorch's own innermost modules, such as BatchNorm and dropout, and quantizers are in eval mode; all others are in
    train mode: it is they who decide what is computed. Their buffers and random generators come out as they went in.
    """
    deciding = _deciding(model)
    with _modes_kept(model), _buffers_kept(deciding), repeatable():
        model.eval()
        for module in deciding:
            module.training = True
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """While open, random numbers are drawn that will be drawn again afterwards, and attention takes no fast path.

    PyTorch's attention takes one where nobody watches, and rounds otherwise there.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _deciding(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not _innermost(module)]


def _innermost(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own without others in it, or belongs to a quantizer."""
    own = type(module).__module__.partition(".")[0] == "torch" and next(module.children(), None) is None
    return own or isinstance(module, Quantizer)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    kept = [(m._buffers, name, t, None if t is None else t.clone()) for m in modules for name, t in m._buffers.items()]
    try:
        yield
    finally:
        for buffers, name, t, value in kept:
            buffers[name] = t
            if not (t is None or value is None or t.is_meta or torch.equal(t, value)):
                t.copy_(value)
