"""Context managers under which a network is observed, and which leave it as it was."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_runner.quant import Quantizer


@contextmanager
def explaining_argument_errors(model: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """Context manager that explains a TypeError if the model's forward does not take these arguments."""
    try:
        yield
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*inputs)
        except TypeError:
            raise TypeError(f"{error}: a batch must be the input alone or a tuple of arguments of forward") from error
        raise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager under which all modules are in eval mode; afterwards each returns to its previous mode."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def eval_without_trace(model: nn.Module) -> Iterator[None]:
    """Context manager under which the network is in eval mode and keeps no trace of what it computes.

    Buffers of its own modules, which may change even in eval mode, and random generators are restored.
    """
    with evaluating(model), _buffers_kept(_deciding(model)), repeatable():
        yield


@contextmanager
def training_paths_without_trace(model: nn.Module) -> Iterator[None]:
    """Context manager under which the network computes what it does in training, and keeps no trace of it.

    What a network computes only in training, auxiliary heads for example, is computed then. PyTorch's own innermost
    modules, such as BatchNorm and dropout, and quantizers are in eval mode. All other modules are in train mode,
    because they decide what is computed; their buffers and the random generators are restored.
    """
    deciding = _deciding(model)
    with _modes_kept(model), _buffers_kept(deciding), repeatable():
        model.eval()
        for module in deciding:
            module.training = True
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """Context manager that restores the random generators afterwards and disables the fast path of PyTorch's attention.

    PyTorch's attention takes the fast path only where no mode observes it, and rounds differently there.
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
    """Whether a module is one of PyTorch's own and has no modules inside, or is a quantizer."""
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
