"""Arrays of rows of different lengths, and the files of the cache folder in which they are kept between two starts."""

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

SETTLED = 2_000_000_000
"""Nanoseconds, more than any file system counts its time in."""


class UnkeptError(Exception):
    """A file of the cache is absent, damaged, or not what it was taken for: what it should hold is to be made anew."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, of numbers or of text as bytes, in two arrays however many rows there are."""

    values: np.ndarray  # [total, ...]
    starts: np.ndarray  # int64 [rows + 1]

    @classmethod
    def of(cls, rows: Sequence[Any], width: tuple[int, ...] = ()) -> "Ragged":
        """Rows of numbers, [length, *width] each, as int32."""
        starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return cls(np.concatenate([np.asarray(row, dtype=np.int32).reshape(-1, *width) for row in rows]), starts)

    @classmethod
    def of_bytes(cls, rows: Sequence[bytes]) -> "Ragged":
        """Rows of bytes, as uint8."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=starts[1:])
        return cls(np.frombuffer(b"".join(rows), dtype=np.uint8), starts)

    @classmethod
    def joined(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of all of at least one, one after the other."""
        ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
        starts = [part.starts[:-1] + before for part, before in zip(parts, ends[:-1], strict=True)]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([*starts, ends[-1:]]))

    @classmethod
    def kept(cls, arrays: Arrays, name: str) -> "Ragged":
        """One of the arrays of a file, as `arrays` named them.

        Raises:
            UnkeptError: it is not there, or its parts do not fit together.
        """
        values, starts = (arrays.get(f"{name}_{part}", np.empty(0)) for part in ("values", "starts"))
        if starts.dtype != np.int64 or starts.ndim != 1 or not len(starts) or starts[0] or starts[-1] != len(values):
            raise UnkeptError(f"no rows of {name}")
        if (np.diff(starts) < 0).any():
            raise UnkeptError(f"rows of {name} out of order")
        return cls(values, starts)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Its parts, by names that `kept` knows."""
        return {f"{name}_values": self.values, f"{name}_starts": self.starts}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def text(self, row: int) -> str:
        """A row of bytes as the name of a file."""
        return os.fsdecode(self[row].tobytes())


def key_of(*what: object) -> str:
    """For the name of a file, by all that what it holds depends on: the same for what is written the same."""
    return hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of the last change, in ns, of files: what tells whether they are those that they were.

    Raises:
        OSError: one is not there.
    """
    found = [(str(path.resolve()), path.stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]


def settled(changed: int, read: int) -> bool:
    """Whether something changed so long before it was read that another change would show, as another time.

    Args:
        changed: when it did last, by the file system, in ns.
        read: when reading it began, in ns.
    """
    return changed < read - SETTLED


def kept_numbers(arrays: Arrays, name: str, dtype: Any, length: int, within: range | None = None) -> NDArray[Any]:
    """One of the arrays of a file, [length].

    Raises:
        UnkeptError: it is not there, has another shape or dtype, or numbers that are not among those of `within`.
    """
    numbers = arrays.get(name, np.empty(0))
    if numbers.dtype != dtype or numbers.shape != (length,):
        raise UnkeptError(f"no {name}")
    if within is not None and length and not (numbers.min() >= within.start and numbers.max() < within.stop):
        raise UnkeptError(f"{name} out of range")
    return numbers


def kept_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What `keep_arrays` wrote, each array held against its checksum; nothing is unpickled.

    Raises:
        UnkeptError: there is no such file, or it is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # whatever a damaged file may raise
        raise UnkeptError(str(error)) from error


def keep_arrays(path: Path, arrays: Arrays) -> None:
    """Write a file whole or not at all; its folder is made where it is missing.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.stem}.{platform.node()}.{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def keep_tokens(path: Path, name: str, arrays: Arrays) -> None:
    """`keep_arrays` of a text's tokens; where they cannot be kept, that is said, and they are made anew next time.

    Args:
        path: of the file.
        name: of what holds the text, to be told.
        arrays: the tokens.
    """
    try:
        keep_arrays(path, arrays)
    except OSError as error:
        log.warning(f"the tokens of {name} could not be kept in {path.parent} ({error.strerror})")
