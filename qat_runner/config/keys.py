"""What the fields of the schema say of themselves beside their type: the range of a number, that a text is a path."""

from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; NaN is none of them.

    Upper ends that mean nothing by themselves are beyond any real use, and short of what overflows.
    """

    least: float
    most: float
    above: bool = False
    """without `least` itself"""
    below: bool = False
    """without `most` itself"""

    def __contains__(self, value: float) -> bool:
        over = value > self.least if self.above else value >= self.least
        return over and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        least, most = (str(n) if isinstance(n, int) else f"{n:g}" for n in (self.least, self.most))
        if not (self.above or self.below):
            return f"{least} to {most}"
        return f"{'above' if self.above else 'at least'} {least} and {'below' if self.below else 'at most'} {most}"


def within(least: float, most: float, *, above: bool = False, below: bool = False) -> dict[str, Range]:
    """The metadata of a field that holds a number, or a list of numbers, of this range; see `Range`."""
    return {"range": Range(least, most, above, below)}


def number(default: T, least: float, most: float, *, above: bool = False, below: bool = False) -> T:
    """A field that holds a number of this range; see `Range`."""
    made: Any = field(default=default, metadata=within(least, most, above=above, below=below))
    return made  # type: ignore[no-any-return]  # what a dataclass makes of it


def path(default: T) -> T:
    """A field that holds a path (or a name instead)."""
    made: Any = field(default=default, metadata={"path": True})
    return made  # type: ignore[no-any-return]


def plain(config: Any) -> dict[str, Any]:
    """A config, or a group of its keys, as nested mappings of what YAML and JSON know: choices as texts."""
    return asdict(config, dict_factory=_plain)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in items}


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """All keys of a config that are no groups of keys: dotted name, field, value; groups that are null are left out."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, each, value
