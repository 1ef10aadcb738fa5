"""Pictures in tar files by WebDataset's convention, each read where it lies.

What has one name before its first dot is one sample: KEY.jpg with its class in KEY.cls, or as "label" in KEY.json.
Where each picture begins is found once, and kept in the cache folder. So they come in any order, as files in folders
do; by themselves they are in the order that class folders would have: by class, then by name.
"""

import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qat_runner.cache import cache_folder
from qat_runner.data.decoding import SUFFIXES
from qat_runner.data.kept import (
    Arrays,
    Ragged,
    UnkeptError,
    keep_arrays,
    kept_arrays,
    kept_numbers,
    key_of,
    settled,
    stamps,
)
from qat_runner.data.listing import CLUTTER, PassedOver, printable
from qat_runner.errors import told

VERSION = 1
"""Of what is kept; another one wherever the same shards would be indexed otherwise."""

CLASSES = 100_000
"""Labels are below."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of what allows no reading from its middle."""

OPEN = 256
"""Shards that a process holds open at a time: a system may allow a thousand files."""

THREADS = 8
"""Shards that are indexed at a time, most of which wait for the disk."""

BLOCK = 512
"""Bytes that a tar file consists of."""

Sample = tuple[int, str, int, int, int]
"""class, name, number of its shard, first byte and size"""


@dataclass(frozen=True)
class Shards:
    """The pictures of one split: by class, then by name. About 50 bytes of memory each."""

    paths: list[str]
    labels: NDArray[np.int32]
    """class of each picture, [N]"""
    shards: NDArray[np.int32]
    """index in `paths`, [N]"""
    starts: NDArray[np.int64]
    """first byte in that file, [N]"""
    sizes: NDArray[np.int64]
    """bytes, [N]"""
    names: Ragged
    """of the members, N"""
    passed_over: str
    """what lies among them and is none; see `PassedOver`"""
    _open: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """file descriptors, that used last at the end"""

    def name(self, index: int) -> str:
        """The shard of a picture, and its name there."""
        return f"{self.paths[self.shards[index]]}/{self.names.text(index)}"

    def content(self, index: int) -> bytes:
        """A picture as it lies in its shard.

        Raises:
            OSError: it cannot be read.
        """
        size = int(self.sizes[index])
        content = os.pread(self._file(int(self.shards[index])), size, int(self.starts[index]))
        if len(content) < size:
            raise OSError("its shard ends before it")
        return content

    def _file(self, shard: int) -> int:
        file = self._open.pop(shard, None)
        if file is None:
            file = os.open(self.paths[shard], os.O_RDONLY)
        self._open[shard] = file
        if len(self._open) > OPEN:
            os.close(self._open.pop(next(iter(self._open))))
        return file

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # another process opens its own

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `kept` makes the same of."""
        words = Ragged.of_bytes([os.fsencode(self.passed_over)])
        numbers = {name: getattr(self, name) for name in ("labels", "shards", "starts", "sizes")}
        return numbers | self.names.arrays("names") | words.arrays("passed_over")

    @classmethod
    def kept(cls, paths: list[str], arrays: Arrays) -> "Shards":
        """The pictures of shards that were kept in these arrays.

        Raises:
            UnkeptError: they make none.
        """
        names, words = (Ragged.kept(arrays, name) for name in ("names", "passed_over"))
        labels, shards = (
            kept_numbers(arrays, name, np.int32, len(names), range(limit))
            for name, limit in (("labels", CLASSES), ("shards", len(paths)))
        )
        starts, sizes = (kept_numbers(arrays, name, np.int64, len(names), range(2**62)) for name in ("starts", "sizes"))
        if len(words) != 1 or not len(names):
            raise UnkeptError("no index")
        return cls(paths, labels, shards, starts, sizes, names, words.text(0))


def read_shards(paths: Sequence[Path]) -> Shards:
    """The pictures of the shards of one split.

    Raises:
        ValueError: a shard is no tar file, compressed or damaged; a picture has no label; there are none.
        OSError: a shard cannot be read.
    """
    stamped = stamps(paths)
    kept = cache_folder() / f"shards_{key_of(VERSION, stamped, SUFFIXES)}.npz"
    with suppress(UnkeptError):
        return Shards.kept([*map(str, paths)], kept_arrays(kept))
    began = time.time_ns()
    shards = _indexed(paths)
    if settled(max(changed for _, _, changed in stamped), began):
        with suppress(OSError):  # then they are indexed anew each time
            keep_arrays(kept, shards.arrays())
    return shards


def _indexed(paths: Sequence[Path]) -> Shards:
    passed_over = PassedOver()
    samples: list[Sample] = []
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_samples, paths, range(len(paths)))
        quiet = not sys.stderr.isatty()
        for some, others in tqdm(found, "indexing shards", len(paths), leave=False, disable=quiet):
            samples += some
            passed_over.add(others)
    if not samples:
        others_ = f" (passed over {passed_over})" if str(passed_over) else ""
        raise ValueError(f"{printable(str(paths[0]))} and its like hold no pictures{others_}")
    samples.sort()
    labels, names, shards, starts, sizes = zip(*samples, strict=True)
    return Shards(
        paths=[*map(str, paths)],
        labels=np.array(labels, dtype=np.int32),
        shards=np.array(shards, dtype=np.int32),
        starts=np.array(starts, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        names=Ragged.of_bytes([*map(os.fsencode, names)]),
        passed_over=str(passed_over),
    )


def _samples(path: Path, shard: int) -> tuple[list[Sample], PassedOver]:
    """The pictures of a shard, with what was passed over."""
    passed_over = PassedOver()
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    for member, key, suffix, read in _members(path, passed_over):
        if suffix in SUFFIXES:
            if key in pictures:
                raise ValueError(f"{printable(str(path))}: two pictures are called {printable(key)}")
            pictures[key] = member
        elif suffix == ".cls":
            labels[key] = _label(path, member.name, read())
        elif suffix == ".json":
            with suppress(ValueError, KeyError, TypeError):  # one that is about something else
                labels.setdefault(key, _label(path, member.name, str(json.loads(read())["label"]).encode()))
        else:
            passed_over.by_suffix[suffix or "no suffix"] += 1
    if alone := labels.keys() - pictures.keys():
        passed_over.by_suffix[".cls"] += len(alone)
    for key, member in pictures.items():
        if key not in labels:
            raise ValueError(
                f"{printable(str(path))}: {printable(member.name)} has no class: there is neither "
                f'{printable(key)}.cls, which holds its number, nor {printable(key)}.json with a "label"'
            )
    return [(labels[key], m.name, shard, m.offset_data, m.size) for key, m in pictures.items()], passed_over


def _members(path: Path, passed_over: PassedOver) -> Iterator[tuple[tarfile.TarInfo, str, str, Callable[[], bytes]]]:
    """The files of a shard, with their keys, their suffixes in lower case, and how to read them."""
    with open(path, "rb") as file:
        _check_head(path, file.read(8))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    folder, base = os.path.split(member.name)
                    stem, dot, suffix = base.partition(".")
                    if member.isdir():
                        continue
                    if base.startswith(".") or base in CLUTTER:
                        passed_over.hidden += 1
                    elif not member.isreg() or member.issparse():
                        passed_over.special.append(f"{path}/{member.name}")
                    else:
                        read = partial(os.pread, file.fileno(), member.size, member.offset_data)
                        yield member, os.path.join(folder, stem), (dot + suffix).lower(), read
                _check_end(path, file.fileno(), tar.offset)
        except tarfile.TarError as error:
            raise ValueError(f"{printable(str(path))} is no tar file, or damaged ({told(error)})") from error


PADDING = 1 << 20
"""Zeros, at most, that programs fill the last record of a tar file with: of 10 KB, if nobody says otherwise."""


def _check_head(path: Path, head: bytes) -> None:
    for magic, program in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{printable(str(path))} is compressed by {program}, so that nothing in it can be read without all "
                f"before it: shards must be plain tar files"
            )


def _check_end(path: Path, file: int, end: int) -> None:
    """Refuse a shard whose last bytes are missing, which tarfile takes for one that ends there; or that goes on after
    its end: with another shard, or with a hole that a download has left."""
    rest = os.pread(file, PADDING + 1, end)
    if rest[:BLOCK] != bytes(BLOCK):
        raise ValueError(f"{printable(str(path))} is cut short or damaged: no end of a tar file follows byte {end}")
    if len(rest) > PADDING or any(rest):
        raise ValueError(
            f"{printable(str(path))} is damaged, or several in one: more follows the end of a tar file at byte {end}"
        )


def _label(path: Path, name: str, content: bytes) -> int:
    text = content.strip()
    if not (text.isdigit() and len(text) < 10 and int(text) < CLASSES):
        raise ValueError(
            f"{printable(str(path))}: {printable(name)} holds {told(repr(content[:20])[1:])}, "
            f"which is not the number of a class, 0 to {CLASSES - 1}"
        )
    return int(text)
