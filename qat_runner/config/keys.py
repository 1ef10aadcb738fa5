"""Metadata of the schema's fields in addition to their types: the range of a number, or that a string is a path."""

from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, excluding NaN.

    Upper limits without a meaning of their own lie beyond any practical value, and below what would overflow.
    """

    least: float
    most: float
    above: bool = False
    """exclude `least` itself"""
    below: bool = False
    """exclude `most` itself"""

    def __contains__(self, value: float) -> bool:
        over = value > self.least if self.above else value >= self.least
        return over and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        least, most = (str(n) if isinstance(n, int) else f"{n:g}" for n in (self.least, self.most))
        if not (self.above or self.below):
            return f"{least} to {most}"
        return f"{'above' if self.above else 'at least'} {least} and {'below' if self.below else 'at most'} {most}"


def within(least: float, most: float, *, above: bool = False, below: bool = False) -> dict[str, Range]:
    """Return the metadata of a field that holds a number, or a list of numbers, in this range; see `Range`."""
    return {"range": Range(least, most, above, below)}


def number(default: T, least: float, most: float, *, above: bool = False, below: bool = False) -> T:
    """Declare a field that holds a number in this range; see `Range`."""
    made: Any = field(default=default, metadata=within(least, most, above=above, below=below))
    return made  # type: ignore[no-any-return]  # the dataclass turns it into the type of the field


def path(default: T) -> T:
    """Declare a field that holds a path, or a name in place of one."""
    made: Any = field(default=default, metadata={"path": True})
    return made  # type: ignore[no-any-return]


def plain(config: Any) -> dict[str, Any]:
    """Convert a config, or a group of its keys, to nested mappings of plain YAML and JSON values; enums become
    strings."""
    return asdict(config, dict_factory=_plain)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in items}


def names_of(schema: Any, prefix: str = "") -> list[str]:
    """Return all dotted keys of a dataclass, and those of its groups."""
    names = []
    for name, hint in get_type_hints(schema).items():
        names.append(prefix + name)
        for part in filter(is_dataclass, (hint, *get_args(hint))):  # the arguments cover groups that may be null
            names += names_of(part, f"{prefix}{name}.")
    return names


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Iterate over all keys of a config that are not groups, as (dotted name, field, value). Groups that are null are
    left out."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, each, value
