"""Deep copies of networks that compute nothing with the original."""

import copy
import dis
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network.

    Raises:
        ValueError: a forward that was set on an instance refers to a module of the network. A copy of it would still
            run the original, since Python does not copy functions.
    """
    again = copy.deepcopy(model)
    originals = {id(module) for module in model.modules()}
    for name, module in again.named_modules():
        if _reaches(vars(module).get("forward"), originals):
            of = f"model.get_submodule({name!r})" if name else "model"
            raise ValueError(
                f"{name or type(module).__name__} has a forward that was set on the instance and refers to the network "
                f"itself, so a copy would still run the original: define it in the class instead; or delete it if it "
                f"only runs the forward of the class, as a compiled one does (del {of}.forward)"
            )
    return again


def _reaches(value: Any, modules: set[int]) -> bool:
    """Whether a value of any kind refers to one of the modules with these ids."""
    seen: dict[int, Any] = {}  # id -> value, which keeps values alive, so that no other gets the same id
    left = [value]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if not isinstance(part, nn.Module):
            left += _parts(part)
        elif any(id(module) in modules for module in part.modules()):
            return True
    return False


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a value refers to and may use when it is called."""
    if isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__, vars(value))  # decorators leave __wrapped__ there
        yield from map(_content, value.__closure__ or ())
        if not _is_of_pytorch(value.__module__):
            yield from map(value.__globals__.get, _names_of_globals(value.__code__))
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif not isinstance(value, type | ModuleType) and not _is_of_pytorch(type(value).__module__):
        yield getattr(value, "__dict__", None)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_of_pytorch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


def _names_of_globals(code: CodeType) -> set[str]:
    """Return the names of the global variables that code reads, functions inside it included."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_names_of_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
