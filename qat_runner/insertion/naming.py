"""Module names for readers: names that differ only in numbers are combined into one."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""Matches a part of a name that is a number."""


def family(name: str) -> str:
    """Return what names that differ only in numbers have in common: layers.*.gate."""
    return _NUMBER.sub("*", name)


def joined_name(names: Sequence[str]) -> str:
    """Return one name for several names of one family, with a * where they differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def merged_notes(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Return one sentence, a name and a note on it, for each note.

    Names of one family with the same note share a sentence.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, said in notes:
        groups.setdefault((family(name), said), []).append(name)
    return [f"{joined_name(names)} {said}" for (_, said), names in groups.items()]
