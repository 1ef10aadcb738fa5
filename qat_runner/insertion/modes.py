"""Context managers under which a network is observed, and which leave it as it was."""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qat_runner.insertion.tensors import copies
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.quant import Quantizer
from qat_runner.quant.tensors import compute_dtype, transformed

Inputs = tuple[Any, ...] | dict[str, Any]
"""Arguments of a forward pass: in their order, or by name."""


def inputs_of(model: nn.Module, batch: Any) -> Inputs:
    """Return the arguments that a batch stands for.

    Args:
        model: whose forward takes them.
        batch: a tuple of arguments; a mapping of names to arguments, if some of them are names in the signature of
            forward, or if forward takes arguments by any name and no others; or else a single argument.
    """
    if isinstance(batch, tuple):
        return batch
    return dict(batch) if isinstance(batch, Mapping) and _takes_by_name(unwrapped(model), batch.keys()) else (batch,)


def inputs_of_batch(model: nn.Module, batch: Any) -> Inputs:
    """As `inputs_of`, for a batch of a data loader, which may hold the arguments in a list."""
    return inputs_of(model, tuple(batch) if isinstance(batch, list) else batch)


def _takes_by_name(model: nn.Module, names: Set[str]) -> bool:
    """Whether the forward of a model takes arguments of these names.

    If it takes any arguments, as those of wrappers do, the only module inside decides, where that can be called.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if names & {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}:
        return True
    kinds = {p.kind for p in parameters}
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if inspect.Parameter.VAR_KEYWORD not in kinds or kinds & positional:
        return False
    inside = [*model.children()]
    passes_on = inspect.Parameter.VAR_POSITIONAL in kinds and len(inside) == 1
    if passes_on and type(inside[0]).forward is not nn.Module.forward:  # as that of a ModuleList, which has none
        return _takes_by_name(unwrapped(inside[0]), names)
    return True


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a model with the arguments of its forward pass and return its output."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def call_with_copies(model: nn.Module, inputs: Inputs) -> Any:
    """As `call`, with copies of the tensors, since a network may modify its inputs."""
    return call(model, copies(inputs))


@contextmanager
def explaining_argument_errors(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Context manager that explains an error if the model's forward does not take these arguments.

    Raises:
        TypeError: instead of another error, if forward takes other arguments, or could not work with a list or a dict.
    """
    try:
        yield
    except (TypeError, AttributeError) as error:
        reason = _misfit(model, inputs)
        if reason is None:
            raise
        raise TypeError(
            f"{type(model).__name__}.forward takes {_taken(model)}: {reason}; a batch must be the input alone, a tuple "
            f"of arguments of forward, or a dict of them by name, without labels"
        ) from error


def _misfit(model: nn.Module, inputs: Inputs) -> str | None:
    """Return why inputs are not the arguments of a model's forward; None if they may be."""
    try:
        call(inspect.signature(model.forward).bind, inputs)
    except TypeError as error:
        return str(error)
    only = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else None
    return f"got one argument, a {type(only).__name__}" if isinstance(only, list | Mapping) else None


def _taken(model: nn.Module) -> str:
    """Return how many arguments the forward of a model takes, and their names."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return "any number of arguments"
    needed = sum(p.default is p.empty for p in parameters)
    count = str(needed) if needed == len(parameters) else f"{needed} to {len(parameters)}"
    names = [p.name for p in parameters]
    return f"{count} argument{'s' * (len(names) != 1)} ({', '.join([*names[:6], *['...'] * (len(names) > 6)])})"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager under which all modules are in eval mode; afterwards each returns to its previous mode."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager under which what torch.compile has compiled runs as plain Python, which hooks and modes observe.

    Compiled code calls the hooks as well, but does not leave behind what they look at.
    """
    eager: AbstractContextManager[object] = nullcontext()
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes seconds
        with suppress(RuntimeError):  # inside a compiled call, where it could not compile the present code
            eager = torch.compiler.set_stance("force_eager")
    with eager:
        yield


@contextmanager
def eval_without_trace(model: nn.Module) -> Iterator[None]:
    """Context manager under which the network is in eval mode and keeps no trace of what it computes.

    Buffers and attributes of its own modules, such as a hidden state, which may change even in eval mode, and random
    generators are restored.
    """
    with evaluating(model), _state_kept(_deciding(model)), repeatable(), uncompiled():
        yield


@contextmanager
def training_paths_without_trace(model: nn.Module) -> Iterator[None]:
    """Context manager under which the network computes what it does in training, and keeps no trace of it.

    What a network computes only in training, auxiliary heads for example, is computed then. PyTorch's own innermost
    modules, such as BatchNorm and dropout, and quantizers are in eval mode. All other modules are in train mode,
    because they decide what is computed; their buffers, their attributes and the random generators are restored.
    """
    deciding = _deciding(model)
    with _modes_kept(model), _state_kept(deciding), repeatable(), uncompiled():
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


def contents(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return what changes if a network creates modules or parameters, or sets the values of parameters, by itself."""
    return _parts(_deciding(model))


def _parts(modules: Collection[nn.Module]) -> list[tuple[Any, ...]]:
    """Return what identifies the submodules and parameters that modules have, and the values of the parameters."""
    inside = [(name, id(part)) for m in modules for name, part in m._modules.items()]
    return inside + [(name, id(p), *_fingerprint(p)) for m in modules for name, p in m._parameters.items()]


_SUMMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""Dtypes whose tensors have a sum and a norm."""


def _fingerprint(parameter: nn.Parameter | None) -> tuple[Any, ...]:
    """Return what changes with the type, the shape or the values of a parameter.

    The values are reduced to their sum and norm, since a copy may not fit in memory, and PyTorch does not count writes
    to `parameter.data`.
    """
    if parameter is None or is_lazy(parameter):
        return (type(parameter),)
    t = parameter.detach()
    t = t.to_local() if hasattr(t, "to_local") else t
    plain = type(t) is Tensor and t.layout is torch.strided and t.dtype in _SUMMED
    if not plain or t.is_meta or transformed():
        return type(parameter), t.shape
    total, norm = t.sum(dtype=compute_dtype(t)), torch.linalg.vector_norm(t, dtype=compute_dtype(t))
    return type(parameter), t.shape, float(total).hex(), float(norm).hex()  # as text, NaN equals itself


@contextmanager
def _state_kept(modules: Collection[nn.Module]) -> Iterator[None]:
    """Context manager that restores buffers, and attributes that were assigned.

    Attributes stay if layers or parameters were created or changed: a network may create or initialize them in its
    first forward pass, and record in an attribute that it did.
    """
    attributes, parts = [(vars(module), dict(vars(module))) for module in modules], _parts(modules)
    kept = [(m._buffers, name, t, None if t is None else t.clone()) for m in modules for name, t in m._buffers.items()]
    try:
        yield
    finally:
        for now, before in attributes if _parts(modules) == parts else ():
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        for buffers, name, t, value in kept:
            buffers[name] = t
            if not (t is None or value is None or t.is_meta or torch.equal(t, value)):
                t.copy_(value)
