"""Which pictures lie in a folder of class folders."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qat_runner.data.decoding import SUFFIXES

CLUTTER = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")
"""What systems leave in folders under names that do not begin with a dot."""


def printable(name: str) -> str:
    """A name on one line, in characters that any text file can hold: as it is, or else as Python writes it."""
    return name if name.isprintable() else repr(name)


@dataclass
class PassedOver:
    """What lies among the pictures and is none. Written out, a part of a sentence, or empty."""

    hidden: int = 0
    by_suffix: Counter[str] = field(default_factory=Counter)
    """files that are no pictures by their names"""
    special: list[str] = field(default_factory=list)
    """pipes, sockets, devices, and links that lead nowhere"""
    repeated: int = 0
    """folders that had been read already, by another link"""
    outside: int = 0
    """pictures beside the class folders"""

    def __str__(self) -> str:
        common = sorted(self.by_suffix, key=lambda suffix: (-self.by_suffix[suffix], suffix))
        suffixes = ", ".join(printable(suffix) for suffix in common[:5])
        first = printable(min(self.special, default=""))
        parts = {
            f"{self.hidden} hidden": self.hidden,
            f"{self.by_suffix.total()} without a picture's suffix ({suffixes})": self.by_suffix,
            f"{len(self.special)} that are neither files nor folders (the first is {first})": self.special,
            f"{self.repeated} links to folders read already": self.repeated,
            f"{self.outside} pictures outside the class folders": self.outside,
        }
        return "; ".join(part for part, there in parts.items() if there)


@dataclass(frozen=True)
class Listing:
    """The pictures of one split."""

    classes: list[str]
    """names of the class folders, sorted"""
    samples: list[tuple[str, int]]
    """path and class of each picture: by class, then by folder, then by name"""
    passed_over: PassedOver


def class_folders(split: Path) -> list[str]:
    """Names of the class folders, sorted."""
    return _entries(str(split), PassedOver())[0]


def list_pictures(split: Path) -> Listing:
    """The pictures in the class folders of a split, and in folders within them; links are followed.

    Nothing but folders is opened. Their files are told apart by what the folder says of them, without asking for each.

    Raises:
        ValueError: a folder cannot be read; there are no class folders, or one without pictures.
    """
    passed_over = PassedOver()
    classes, beside = _entries(str(split), passed_over)
    passed_over.outside = len(beside)
    if not classes:
        raise ValueError(f"{printable(str(split))} has no class folders")
    above = {_identity(str(folder)) for folder in (split, *split.resolve().parents)}
    samples: list[tuple[str, int]] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        before = len(samples)
        for folder, files in sorted(_walk(os.path.join(split, name), set(above), passed_over)):
            samples.extend((f"{folder}/{file}", label) for file in files)
        if len(samples) == before:
            empty.append(printable(name))
    if empty:
        others = f" (passed over {passed_over})" if str(passed_over) else ""
        many = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ValueError(
            f"{printable(str(split))}: class folders without pictures: {', '.join(empty[:5])}{many}{others}; "
            f"pictures are {', '.join(SUFFIXES)}"
        )
    return Listing(classes, samples, passed_over)


def _walk(top: str, seen: set[tuple[int, int]], passed_over: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `top` downwards, and the pictures in it. Each is read once, so links may lead in circles."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        if (identity := _identity(folder)) in seen:
            passed_over.repeated += 1
            continue
        seen.add(identity)
        folders, files = _entries(folder, passed_over)
        waiting.extend(f"{folder}/{name}" for name in reversed(folders))
        yield folder, files


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _entries(folder: str, passed_over: PassedOver) -> tuple[list[str], list[str]]:
    """Names of the folders and of the pictures in a folder, both sorted."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name in CLUTTER:
                    passed_over.hidden += 1
                elif _holds(entry.is_dir):
                    folders.append(name)
                elif not name.lower().endswith(SUFFIXES):
                    passed_over.by_suffix[os.path.splitext(name)[1].lower() or "no suffix"] += 1
                elif _holds(entry.is_file):
                    files.append(name)
                else:
                    passed_over.special.append(entry.path)
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be read ({error.strerror})") from error
    return sorted(folders), sorted(files)


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself, or past a folder that is closed to us
        return False
