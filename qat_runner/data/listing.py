"""List the images in a folder of class folders.

The listing is cached. It stays valid as long as no folder and no target of a link has changed: each start checks these,
about a thousand for ImageNet, but no image file.
"""

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat_runner.cache import cache_folder
from qat_runner.data.array_cache import (
    Arrays,
    CacheMissError,
    Ragged,
    cached_numbers,
    is_stable,
    key_of,
    load_arrays,
    save_arrays,
)
from qat_runner.data.decoding import SUFFIXES

VERSION = 1
"""Version of the cached listings; it changes whenever the same folder would be listed differently."""

CLUTTER = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")
"""Names, without a leading dot, of files and folders that operating systems leave behind."""


def printable(name: str) -> str:
    """Return a name as it is if it is printable; otherwise return its repr, which is."""
    return name if name.isprintable() else repr(name)


@dataclass
class SkippedFiles:
    """Counts of what was skipped because it is not an image. As a string: a part of a sentence, or empty."""

    hidden: int = 0
    by_suffix: Counter[str] = field(default_factory=Counter)
    """files whose suffix is not one of an image"""
    special: list[str] = field(default_factory=list)
    """pipes, sockets, devices and broken links"""
    repeated: int = 0
    """folders that had already been read through another link"""
    outside: int = 0
    """images beside the class folders"""

    def add(self, other: "SkippedFiles") -> None:
        """Add the counts of another instance."""
        self.hidden += other.hidden
        self.by_suffix += other.by_suffix
        self.special += other.special
        self.repeated += other.repeated
        self.outside += other.outside

    def __str__(self) -> str:
        common = sorted(self.by_suffix, key=lambda suffix: (-self.by_suffix[suffix], suffix))
        suffixes = ", ".join(printable(suffix) for suffix in common[:5])
        first = printable(min(self.special, default=""))
        parts = {
            f"{self.hidden} hidden": self.hidden,
            f"{self.by_suffix.total()} without an image suffix ({suffixes})": self.by_suffix,
            f"{len(self.special)} that are neither files nor folders (the first is {first})": self.special,
            f"{self.repeated} links to folders already read": self.repeated,
            f"{self.outside} images outside the class folders": self.outside,
        }
        return "; ".join(part for part, there in parts.items() if there)


@dataclass(frozen=True)
class Listing:
    """The images of one split, ordered by class, then by folder, then by name. About 30 bytes of memory per image."""

    split: str
    """path of the folder that contains the class folders"""
    classes: list[str]
    """names of the class folders, sorted"""
    labels: NDArray[np.int32]
    """class of each image, [N]"""
    folders: Ragged
    """paths of the folders relative to `split`, F of them"""
    firsts: NDArray[np.int64]
    """index of the first image of each folder, then the number of images, [F + 1]"""
    names: Ragged
    """names of the files, N of them"""
    passed_over: str
    """what was skipped because it is not an image; see `SkippedFiles`"""

    def name(self, index: int) -> str:
        """Return the path of an image."""
        folder = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return f"{self.split}/{self.folders.text(folder)}/{self.names.text(index)}"

    def content(self, index: int) -> bytes:
        """Return the content of an image file.

        Raises:
            OSError: it cannot be read.
        """
        with open(self.name(index), "rb") as file:
            return file.read()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the listing as arrays, from which `from_arrays` restores it."""
        classes = Ragged.of_bytes([os.fsencode(name) for name in self.classes])
        skipped = Ragged.of_bytes([os.fsencode(self.passed_over)])
        ragged = {"classes": classes, "folders": self.folders, "names": self.names, "passed_over": skipped}
        flat = {key: array for name, rows in ragged.items() for key, array in rows.arrays(name).items()}
        return flat | {"labels": self.labels, "firsts": self.firsts}

    @classmethod
    def from_arrays(cls, split: str, arrays: Arrays) -> "Listing":
        """Restore the listing of a split from cached arrays.

        Raises:
            CacheMissError: the arrays are not a listing.
        """
        parts = ("classes", "folders", "names", "passed_over")
        classes, folders, names, skipped = (Ragged.from_arrays(arrays, name) for name in parts)
        labels = cached_numbers(arrays, "labels", np.int32, len(names), range(len(classes)))
        firsts = cached_numbers(arrays, "firsts", np.int64, len(folders) + 1, range(len(names) + 1))
        if (np.diff(firsts) < 0).any() or firsts[0] != 0 or firsts[-1] != len(names) or len(skipped) != 1:
            raise CacheMissError("folders are out of order")
        return cls(split, [*map(classes.text, range(len(classes)))], labels, folders, firsts, names, skipped.text(0))


def class_folders(split: Path) -> list[str]:
    """Return the names of the class folders, sorted."""
    return _Reader(split).entries(str(split))[0]


def list_images(split: Path) -> Listing:
    """List the images in the class folders of a split, including nested folders; links are followed.

    Only folders are opened. The kind of each entry is taken from its folder entry, without a system call per file.

    Raises:
        ValueError: a folder cannot be read, there are no class folders, or a class folder has no images.
    """
    key = key_of(VERSION, str(split.resolve()), SUFFIXES, CLUTTER)  # `_unchanged` checks the contents of the folder
    kept = cache_folder() / f"pictures_{key}.npz"
    with suppress(CacheMissError):
        arrays = load_arrays(kept)
        if _unchanged(split, arrays):
            return Listing.from_arrays(str(split), arrays)
    began, reader = time.time_ns(), _Reader(split)
    listing = reader.listing()
    if is_stable(reader.changed, began):
        with suppress(OSError):  # without a cache file, the next start lists the folder again
            save_arrays(kept, listing.arrays() | reader.witnesses())
    return listing


def _unchanged(split: Path, arrays: Arrays) -> bool:
    """Return whether all folders and links that the listing of a split depends on are unchanged."""
    paths = Ragged.from_arrays(arrays, "witnesses")
    said = cached_numbers(arrays, "stamps", np.uint64, 4 * len(paths)).reshape(-1, 4).tolist()
    return all(tuple(then) == _stamp(f"{split}/{paths.text(row)}") for row, then in enumerate(said))


def _stamp(path: str) -> tuple[int, int, int, int]:
    """Return a stamp that shows whether a path has changed.

    It contains the kind, inode, modification time and status change time (in ns) of a folder, and only the kind of
    anything else.
    """
    try:
        found = os.stat(path)
    except OSError:  # a broken link
        return 0, 0, 0, 0
    if not stat.S_ISDIR(found.st_mode):
        return stat.S_IFMT(found.st_mode), 0, 0, 0
    times = (n % 2**64 for n in (found.st_ino, found.st_mtime_ns, found.st_ctime_ns))  # times before 1970 are negative
    return stat.S_IFMT(found.st_mode), *times  # type: ignore[return-value]  # three values


class _Reader:
    """Reads the folders of a split, and records what it skipped and what the listing depends on."""

    def __init__(self, split: Path) -> None:
        self.split = split
        self.passed_over = SkippedFiles()
        self.stamps: dict[str, tuple[int, int, int, int]] = {}
        """stamps of each folder (taken before it was read) and of the target of each link, by path"""

    @property
    def changed(self) -> int:
        """Time of the latest change of any folder, in ns."""
        return max(max(times) for _, _, *times in self.stamps.values())

    def witnesses(self) -> dict[str, NDArray[Any]]:
        """Return the stamps and their paths relative to the split, as arrays."""
        prefix = len(str(self.split)) + 1
        paths = Ragged.of_bytes([os.fsencode(path[prefix:]) for path in self.stamps])
        return paths.arrays("witnesses") | {"stamps": np.array([*self.stamps.values()], dtype=np.uint64).reshape(-1)}

    def listing(self) -> Listing:
        """List the images; see `list_images`."""
        classes, beside = self.entries(str(self.split))
        self.passed_over.outside = len(beside)
        if not classes:
            raise ValueError(f"{printable(str(self.split))} has no class folders")
        above = {_identity(str(folder)) for folder in (self.split, *self.split.resolve().parents)}
        folders: list[str] = []
        labels: list[int] = []
        names: list[Ragged] = []
        for label, name in enumerate(classes):
            for folder, files in sorted(self._walk(os.path.join(self.split, name), set(above))):
                folders.append(folder[len(str(self.split)) + 1 :])
                labels.append(label)
                names.append(Ragged.of_bytes([*map(os.fsencode, files)]))
        counts = np.array([len(files) for files in names], dtype=np.int64)
        by_image = np.repeat(np.array(labels, dtype=np.int32), counts)
        empty = np.setdiff1d(np.arange(len(classes)), by_image)
        _check_classes(self.split, [classes[label] for label in empty], self.passed_over)
        return Listing(
            str(self.split),
            classes,
            by_image,
            Ragged.of_bytes([*map(os.fsencode, folders)]),
            np.cumsum([0, *counts], dtype=np.int64),
            Ragged.joined(names),
            str(self.passed_over),
        )

    def _walk(self, top: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder from `top` downwards, and the images in it.

        Each folder is read once, so links may form cycles.
        """
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            if (identity := _identity(folder)) in seen:
                self.passed_over.repeated += 1
                continue
            seen.add(identity)
            folders, files = self.entries(folder)
            waiting.extend(f"{folder}/{name}" for name in reversed(folders))
            yield folder, files

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the images in a folder, both sorted."""
        folders: list[str] = []
        files: list[str] = []
        self.stamps[folder] = _stamp(folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._sort(entry, folders, files)
        except OSError as error:
            raise ValueError(f"{printable(folder)} cannot be read ({error.strerror})") from error
        return sorted(folders), sorted(files)

    def _sort(self, entry: "os.DirEntry[str]", folders: list[str], files: list[str]) -> None:
        """Add the entry to the folders, to the files, or to what was skipped."""
        name = entry.name
        if name.startswith(".") or name in CLUTTER:
            self.passed_over.hidden += 1
            return
        if entry.is_symlink():
            self.stamps[entry.path] = _stamp(entry.path)
        if _holds(entry.is_dir):
            folders.append(name)
        elif not name.lower().endswith(SUFFIXES):
            self.passed_over.by_suffix[os.path.splitext(name)[1].lower() or "no suffix"] += 1
        elif _holds(entry.is_file):
            files.append(name)
        else:
            self.passed_over.special.append(entry.path)


def _check_classes(split: Path, empty: list[str], passed_over: SkippedFiles) -> None:
    """Raise ValueError if there are class folders without images; the message lists the first of them."""
    if empty:
        others = f" (skipped {passed_over})" if str(passed_over) else ""
        many = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ValueError(
            f"{printable(str(split))}: class folders without images: {', '.join(map(printable, empty[:5]))}{many}"
            f"{others}; images must end in {', '.join(SUFFIXES)}"
        )


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself, or through a folder without access permission
        return False
