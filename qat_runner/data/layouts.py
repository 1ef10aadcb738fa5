"""The layouts of an image data set on disk. The layout is detected, and all layouts have the same interface."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qat_runner.data.listing import class_folders, list_images, printable
from qat_runner.data.parquet import as_shards
from qat_runner.data.shards import read_shards

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid")}
"""For each split, the words for it in the names of files and folders."""

NAMES = ("classes.txt", "classnames.txt")
"""Allowed names of the file that lists the names of the classes, one per line."""

CONTENT = (
    "train/ and val/ with a folder of images for each class, or tar shards (train-0000.tar ..., val-0000.tar ...), "
    "or parquet files (train-00000-of-00294.parquet ..., validation-00000-of-00014.parquet ..., also in data/)"
)


CLASS_FOLDERS, TAR_SHARDS, PARQUET_FILES = "class folders", "tar shards", "parquet files"


class Images(Protocol):
    """The images of one split, ordered by class, then by name.

    The order is the same in all layouts, except for class folders that contain folders, which are read one after
    another.
    """

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class of each image, [N]."""

    @property
    def passed_over(self) -> str:
        """What was skipped because it is not an image; see `SkippedFiles`."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    def content(self, index: int) -> bytes:
        """Return the content of the image file.

        Raises:
            OSError: it cannot be read.
        """


@dataclass(frozen=True)
class Stored:
    """Both splits, train and val, of a data set; each has images of every class."""

    classes: list[str]
    splits: Mapping[str, Images]
    note: str = ""


def read_images(folder: Path) -> Stored:
    """Find the images of a folder in any of the layouts.

    Raises:
        ValueError: the folder has none or several of the layouts, or its files are damaged or inconsistent.
        OSError: the folder cannot be read.
    """
    layout = find_layout(folder)
    if layout is None:
        raise ValueError(f"the folder must contain {CONTENT}")
    return _READ[layout](folder)


def find_layout(folder: Path) -> str | None:
    """Return the layout of a folder, detected by the names in it, or None if it has none.

    Raises:
        ValueError: the folder has several layouts.
        OSError: the folder cannot be read.
        ModuleNotFoundError: the layout needs an optional dependency.
    """
    found = [layout for layout in _READ if _has(layout, folder)]
    if len(found) > 1:
        raise ValueError(f"the folder contains {' and '.join(found)}; remove all but one: it must contain {CONTENT}")
    if found == [PARQUET_FILES] and find_spec("pyarrow") is None:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    return found[0] if found else None


def _has(layout: str, folder: Path) -> bool:
    if layout == CLASS_FOLDERS:
        return all((folder / split).is_dir() and class_folders(folder / split) for split in SPLITS)
    return all(_files(folder, "tar" if layout == TAR_SHARDS else "parquet").values())


def _files(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the tar or parquet files of each split, sorted."""
    return {split: sorted(_files_of(folder, suffix, words)) for split, words in SPLITS.items()}


def _complete(files: Mapping[str, Sequence[Path]]) -> Mapping[str, Sequence[Path]]:
    """Return the files of each split after checking, by their names, that they are one complete set.

    Raises:
        ValueError: the set is incomplete, for example after an interrupted download, or there is more than one set.
    """
    for split, paths in files.items():
        by_name: dict[str, Path] = {}
        for path in paths:
            if (other := by_name.setdefault(path.name, path)) is not path:
                here, there = printable(str(other)), printable(str(path))
                raise ValueError(f"{split}: {here} and {there} have the same name; remove one of them")
        counts = sorted({int(found[1]) for name in by_name if (found := re.search(r"-of-(\d+)\.", name))})
        if len(counts) > 1:
            sizes = " and ".join(map(str, counts))
            raise ValueError(f"{split}: there are sets of {sizes} files; remove all but one of them")
        if counts and len(by_name) < counts[0]:
            raise ValueError(
                f"{split}: only {len(by_name)} of {counts[0]} files are there, such as {printable(paths[0].name)}; to "
                f"use a subset on purpose, remove -of-{counts[0]} from the names"
            )
    return files


def _files_of(folder: Path, suffix: str, words: Sequence[str]) -> Iterator[Path]:
    """Yield the files of a split: numbered files named after it, and a file with exactly its name.

    In a folder with the name of the split, all numbered files belong to it. Hidden files are ignored.
    """
    # Compressed files match as well, so that reading them raises an error that says why they are not allowed.
    number, ending = r"\d+(-of-\d+)?", rf"\.{suffix}(\.gz|\.bz2|\.xz|\.zst)?"
    named = rf"((.*[-_.])?({'|'.join(words)})[-_.]?{number}|{'|'.join(words)})"
    for place in (folder, folder / "data", *(folder / word for word in words)):
        pattern = re.compile(f"({named}|{number}){ending}" if place.name in words else f"{named}{ending}")
        if place.is_dir():
            seen = (path for path in place.iterdir() if not path.name.startswith("."))
            yield from (path for path in seen if pattern.fullmatch(path.name) and path.is_file())


def _read_class_folders(folder: Path) -> Stored:
    listings = {split: list_images(folder / split) for split in SPLITS}
    train, val = (listing.classes for listing in listings.values())
    for name in sorted({*train} ^ {*val}):
        here, there = ("train", "val") if name in train else ("val", "train")
        raise ValueError(
            f"train/ and val/ must have the same class folders: {here}/ has {printable(name)}, but {there}/ does not"
        )
    return Stored(train, listings)


def _read_tar_shards(folder: Path) -> Stored:
    return _of_shards(_complete(_files(folder, "tar")), _names(folder))


def _read_parquet_files(folder: Path) -> Stored:
    shards = as_shards(_complete(_files(folder, "parquet")))
    stored = _of_shards(_files(shards, "tar"), _names(folder) or _names(shards))
    return replace(
        stored, note=f"read from the tar shards in {printable(str(shards))}, which were made from the parquet files"
    )


def _of_shards(files: Mapping[str, Sequence[Path]], names: list[str] | None) -> Stored:
    """Read the shards of both splits. `names` are the names of the classes; None: use their numbers as names."""
    splits = {split: read_shards(paths) for split, paths in files.items()}
    count = 1 + max(int(images.labels.max()) for images in splits.values()) if names is None else len(names)
    for split, images in splits.items():
        found = np.unique(images.labels)
        if found[-1] >= count:
            raise ValueError(f"{split}: an image has class {found[-1]}, but {NAMES[0]} lists classes 0 to {count - 1}")
        for missing in np.setdiff1d(np.arange(count), found):
            raise ValueError(
                f"{split}: class {missing} has no images; each of the classes 0 to {count - 1} must have some"
            )
    return Stored([*map(str, range(count))] if names is None else names, splits)


def _names(folder: Path) -> list[str] | None:
    """Return the names of the classes from the file NAMES in a folder, or None if there is no such file.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").splitlines()
    return None


_READ: dict[str, Callable[[Path], Stored]] = {
    CLASS_FOLDERS: _read_class_folders,
    TAR_SHARDS: _read_tar_shards,
    PARQUET_FILES: _read_parquet_files,
}
