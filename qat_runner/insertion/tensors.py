"""The tensors in what a network takes or returns."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
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


def samples_in(inputs: Any) -> int:
    """Return the number of samples in the arguments of a forward pass.

    It is the size that most arguments have in common: for a tensor, that of its first dimension; for a list (of
    images of different sizes, say), its length. Vectors, and tensors whose first size is 1, may be factors or
    positions that all samples share, so they count only if there is nothing else.

    Args:
        inputs: a tuple or mapping of arguments; mappings and dataclasses among them hold further ones.

    Returns:
        The number; 1 if there is no tensor with a dimension.
    """
    sizes = [*_first_sizes(inputs.values() if isinstance(inputs, Mapping) else inputs)]
    if common := Counter(size for size, dims in sizes if size > 1 and dims > 1).most_common(1):
        return common[0][0]
    return max(sizes, key=lambda found: found[1], default=(1, 0))[0]


def _first_sizes(arguments: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Yield (size, number of dimensions) for each argument that may have one entry per sample, as in `samples_in`."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.ndim:
                yield argument.shape[0], argument.ndim
        elif isinstance(argument, Mapping):
            yield from _first_sizes(argument.values())
        elif is_dataclass(argument):
            yield from _first_sizes(getattr(argument, field.name) for field in fields(argument))
        elif dims := [t.ndim for t in tensors_of(argument) if t is not None]:
            yield len(argument), 1 + max(dims)
