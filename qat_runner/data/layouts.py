"""How a data set of pictures may lie on the disk: found by looking, read in one way."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qat_runner.data.listing import class_folders, list_pictures, printable
from qat_runner.data.parquet import as_shards
from qat_runner.data.shards import read_shards

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid")}
"""Words for each in the names of files and folders."""

NAMES = ("classes.txt", "classnames.txt")
"""A file of the names of classes, one a line, is called so."""

CONTENT = (
    "train/ and val/ with a folder of pictures for each class, or tar shards (train-0000.tar ..., val-0000.tar ...), "
    "or parquet files (train-00000-of-00294.parquet ..., validation-00000-of-00014.parquet ..., also in data/)"
)


CLASS_FOLDERS, TAR_SHARDS, PARQUET_FILES = "class folders", "tar shards", "parquet files"


class Pictures(Protocol):
    """The pictures of one split in their own order: by class, then by name.

    It is the same in all layouts, but for class folders with folders in them, which are read one after another.
    """

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class of each, [N]."""

    @property
    def passed_over(self) -> str:
        """What lies among them and is none."""

    def name(self, index: int) -> str:
        """What a message calls a picture."""

    def content(self, index: int) -> bytes:
        """What a file of it would hold.

        Raises:
            OSError: it cannot be read.
        """


@dataclass(frozen=True)
class Stored:
    """Both splits, train and val, of a data set; each has pictures of every class."""

    classes: list[str]
    splits: Mapping[str, Pictures]
    note: str = ""


def read_pictures(folder: Path) -> Stored:
    """The pictures of a folder in any of the layouts.

    Raises:
        ValueError: it has none of them, or several; or what lies there is damaged or does not belong together.
        OSError: it cannot be read.
    """
    layout = find_layout(folder)
    if layout is None:
        raise ValueError(f"there must lie {CONTENT}")
    return _READ[layout](folder)


def find_layout(folder: Path) -> str | None:
    """Which of the layouts a folder has, by the names in it; None: none.

    Raises:
        ValueError: several.
        OSError: it cannot be read.
        ModuleNotFoundError: it needs an extra.
    """
    found = [layout for layout in _READ if _has(layout, folder)]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} lie side by side, of which one has to go: there must lie {CONTENT}")
    if found == [PARQUET_FILES] and find_spec("pyarrow") is None:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    return found[0] if found else None


def _has(layout: str, folder: Path) -> bool:
    if layout == CLASS_FOLDERS:
        return all((folder / split).is_dir() and class_folders(folder / split) for split in SPLITS)
    return all(_files(folder, "tar" if layout == TAR_SHARDS else "parquet").values())


def _files(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """The tar or parquet files of each split, by name."""
    return {split: sorted(_files_of(folder, suffix, words)) for split, words in SPLITS.items()}


def _complete(files: Mapping[str, Sequence[Path]]) -> Mapping[str, Sequence[Path]]:
    """The files of each split, if they are one whole set, as far as their names tell.

    Raises:
        ValueError: a part of one, as of a download that was broken off; or more than one.
    """
    for split, paths in files.items():
        by_name: dict[str, Path] = {}
        for path in paths:
            if (other := by_name.setdefault(path.name, path)) is not path:
                here, there = printable(str(other)), printable(str(path))
                raise ValueError(f"{split}: {here} and {there} have one name, so that one of them has to go")
        counts = sorted({int(found[1]) for name in by_name if (found := re.search(r"-of-(\d+)\.", name))})
        if len(counts) > 1:
            told = " and ".join(map(str, counts))
            raise ValueError(f"{split}: sets of {told} files lie side by side, so that one of them has to go")
        if counts and len(by_name) < counts[0]:
            raise ValueError(
                f"{split}: {len(by_name)} of {counts[0]} files are there, such as {printable(paths[0].name)}; a part "
                f"that is to do must not have -of-{counts[0]} in its names"
            )
    return files


def _files_of(folder: Path, suffix: str, words: Sequence[str]) -> Iterator[Path]:
    """A numbered file named after a split, or one with its very name; in a folder of that name, any numbered file.
    Hidden ones are passed over."""
    number, ending = r"\d+(-of-\d+)?", rf"\.{suffix}(\.gz|\.bz2|\.xz|\.zst)?"  # of which the last is refused in words
    named = rf"((.*[-_.])?({'|'.join(words)})[-_.]?{number}|{'|'.join(words)})"
    for place in (folder, folder / "data", *(folder / word for word in words)):
        pattern = re.compile(f"({named}|{number}){ending}" if place.name in words else f"{named}{ending}")
        if place.is_dir():
            seen = (path for path in place.iterdir() if not path.name.startswith("."))
            yield from (path for path in seen if pattern.fullmatch(path.name) and path.is_file())


def _read_class_folders(folder: Path) -> Stored:
    listings = {split: list_pictures(folder / split) for split in SPLITS}
    train, val = (listing.classes for listing in listings.values())
    for name in sorted({*train} ^ {*val}):
        here, there = ("train", "val") if name in train else ("val", "train")
        raise ValueError(
            f"train/ and val/ must have the same class folders: {here}/ has {printable(name)}, {there}/ not"
        )
    return Stored(train, listings)


def _read_tar_shards(folder: Path) -> Stored:
    return _of_shards(_complete(_files(folder, "tar")), _names(folder))


def _read_parquet_files(folder: Path) -> Stored:
    shards = as_shards(_complete(_files(folder, "parquet")))
    stored = _of_shards(_files(shards, "tar"), _names(folder) or _names(shards))
    return replace(stored, note=f"read from the tar shards in {printable(str(shards))}, made of the parquet files")


def _of_shards(files: Mapping[str, Sequence[Path]], names: list[str] | None) -> Stored:
    """Shards of both splits, with the names of their classes; None: their numbers."""
    splits = {split: read_shards(paths) for split, paths in files.items()}
    count = 1 + max(int(pictures.labels.max()) for pictures in splits.values()) if names is None else len(names)
    for split, pictures in splits.items():
        found = np.unique(pictures.labels)
        if found[-1] >= count:
            raise ValueError(f"{split}: a picture is of class {found[-1]}, and {NAMES[0]} names 0 to {count - 1}")
        for missing in np.setdiff1d(np.arange(count), found):
            raise ValueError(f"{split}: class {missing} has no pictures, of classes 0 to {count - 1}")
    return Stored([*map(str, range(count))] if names is None else names, splits)


def _names(folder: Path) -> list[str] | None:
    """The names of classes in a folder's file of them.

    Raises:
        ValueError: it is no text.
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
