"""The tensors in what a network takes or returns."""

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def copies(values: Any) -> Any:
    """Copy the tensors in nested lists, tuples, mappings and dataclasses, for a network that writes to its inputs.

    A tensor that occurs several times is copied once.
    """
    made: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return made.setdefault(id(value), value.detach().clone())
        if isinstance(value, MutableMapping) or (is_dataclass(value) and not isinstance(value, type)):
            return changed(value)  # of a class that PyTorch does not know
        return value

    def changed(value: Any) -> Any:
        again = copy.copy(value)
        if isinstance(value, MutableMapping):
            again.update({key: tree_map(copied, inner) for key, inner in value.items()})
        else:
            for field in fields(value):
                object.__setattr__(again, field.name, tree_map(copied, getattr(value, field.name)))
        return again

    return tree_map(copied, values)


def whole(t: Tensor) -> Tensor:
    """Return a tensor of which each process has a shard (a DTensor) as a whole, in all processes; any other as it
    is."""
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full


def tensors_of(value: Any) -> list[Tensor | None]:
    """Return the tensors in nested lists, tuples, mappings and dataclasses, in order, and None for anything else."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_of(v)]
    if is_dataclass(value):
        return [t for field in fields(value) for t in tensors_of(getattr(value, field.name))]
    return [None]
