"""Names of modules for a reader: those that differ in numbers alone are one."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number."""


def family(name: str) -> str:
    """What names that differ in numbers alone have in common: layers.*.gate."""
    return _NUMBER.sub("*", name)


def together(names: Sequence[str]) -> str:
    """One name for several of one family, with a * where they differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def told_once(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences, each a name and what is said of it; what is said of a family is said once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, said in notes:
        groups.setdefault((family(name), said), []).append(name)
    return [f"{together(names)} {said}" for (_, said), names in groups.items()]
