"""The tensors in what a network takes or returns."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def copies(values: Any) -> Any:
    """Copy the tensors in nested lists, tuples and mappings, for a network that writes to its inputs.

    A tensor that occurs several times is copied once.
    """
    made: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        return made.setdefault(id(value), value.detach().clone()) if isinstance(value, Tensor) else value

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
