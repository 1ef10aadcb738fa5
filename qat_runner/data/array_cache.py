"""Ragged arrays, and the files in the cache folder that keep arrays from one start to the next."""

import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

log = logging.getLogger("qat_runner")

TIMESTAMP_MARGIN = 2_000_000_000
"""Nanoseconds, longer than the resolution of the timestamps of any file system."""


class CacheMissError(Exception):
    """A cache file is missing, damaged or of another kind, so its content has to be created again."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, of numbers or of text as bytes. All rows together are stored in two arrays."""

    values: np.ndarray  # [total, ...]
    starts: np.ndarray  # int64 [rows + 1]

    @classmethod
    def of(cls, rows: Sequence[Any], width: tuple[int, ...] = ()) -> "Ragged":
        """Create a ragged array of int32 from rows of numbers, [length, *width] each."""
        starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return cls(np.concatenate([np.asarray(row, dtype=np.int32).reshape(-1, *width) for row in rows]), starts)

    @classmethod
    def of_bytes(cls, rows: Sequence[bytes]) -> "Ragged":
        """Create a ragged array of uint8 from rows of bytes."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=starts[1:])
        return cls(np.frombuffer(b"".join(rows), dtype=np.uint8), starts)

    @classmethod
    def joined(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Concatenate the rows of one or more ragged arrays."""
        ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
        starts = [part.starts[:-1] + before for part, before in zip(parts, ends[:-1], strict=True)]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([*starts, ends[-1:]]))

    @classmethod
    def from_arrays(cls, arrays: Arrays, name: str) -> "Ragged":
        """Restore a ragged array from the arrays of a file, which have the names that the method `arrays` gives them.

        Raises:
            CacheMissError: it is missing, or its parts do not fit together.
        """
        values, starts = (arrays.get(f"{name}_{part}", np.empty(0)) for part in ("values", "starts"))
        if starts.dtype != np.int64 or starts.ndim != 1 or not len(starts) or starts[0] or starts[-1] != len(values):
            raise CacheMissError(f"rows of {name} are missing or inconsistent")
        if (np.diff(starts) < 0).any():
            raise CacheMissError(f"rows of {name} are out of order")
        return cls(values, starts)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Return its two arrays, under the names that `from_arrays` expects."""
        return {f"{name}_values": self.values, f"{name}_starts": self.starts}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def text(self, row: int) -> str:
        """Return a row of bytes, decoded as a file name."""
        return os.fsdecode(self[row].tobytes())


def key_of(*what: object) -> str:
    """Return a hash for a file name, of everything that the content of the file depends on.

    Arguments with the same repr give the same hash.
    """
    return hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return the path, size and modification time (in ns) of files, which show whether a file has changed.

    Raises:
        OSError: a file is missing.
    """
    found = [(str(path.resolve()), path.stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]


def is_stable(changed: int, read: int) -> bool:
    """Return whether the last change was so long before the reading that a later change would have another timestamp.

    Args:
        changed: time of the last change according to the file system, in ns.
        read: time at which the reading began, in ns.
    """
    return changed < read - TIMESTAMP_MARGIN


def cached_numbers(arrays: Arrays, name: str, dtype: Any, length: int, within: range | None = None) -> NDArray[Any]:
    """Return one of the arrays of a file, [length].

    Raises:
        CacheMissError: it is missing, has another shape or dtype, or contains numbers outside `within`.
    """
    numbers = arrays.get(name, np.empty(0))
    if numbers.dtype != dtype or numbers.shape != (length,):
        raise CacheMissError(f"{name} is missing, or has another shape or dtype")
    if within is not None and length and not (numbers.min() >= within.start and numbers.max() < within.stop):
        raise CacheMissError(f"{name} is out of range")
    return numbers


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read a file that `save_arrays` wrote. The checksum of each array is verified; nothing is unpickled.

    Raises:
        CacheMissError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a damaged file may raise any exception
        raise CacheMissError(str(error)) from error


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays to a file atomically; a missing folder is created.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.stem}.{platform.node()}.{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def cache_tokens(path: Path, name: str, arrays: Arrays) -> None:
    """Cache the tokens of a text by `save_arrays`. On failure a warning is logged; the next start tokenizes again.

    Args:
        path: path of the cache file.
        name: name of the text file, for the warning.
        arrays: the tokens.
    """
    try:
        save_arrays(path, arrays)
    except OSError as error:
        log.warning(f"the tokens of {name} could not be cached in {path.parent} ({error.strerror})")
