"""Images in tar files with the WebDataset naming convention, read by random access.

Files with the same name before the first dot form one sample: KEY.jpg with its class in KEY.cls, or as "label" in
KEY.json. The offset of each image is found once and cached, so images can be read in any order, like files in folders.
Their own order is the one that class folders would have: by class, then by name.
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
from qat_runner.data.array_cache import (
    Arrays,
    CacheMissError,
    Ragged,
    cached_numbers,
    is_stable,
    key_of,
    load_arrays,
    save_arrays,
    stamps,
)
from qat_runner.data.decoding import SUFFIXES
from qat_runner.data.listing import CLUTTER, SkippedFiles, printable
from qat_runner.errors import one_line

VERSION = 1
"""Version of the cached index; it changes whenever the same shards would be indexed differently."""

CLASSES = 100_000
"""Upper limit of the labels, exclusive."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files, which do not allow random access."""

OPEN = 256
"""Maximum number of shards that a process keeps open: a system may allow only a thousand open files."""

THREADS = 8
"""Number of shards that are indexed in parallel; most threads wait for the disk."""

BLOCK = 512
"""Block size of a tar file in bytes."""

Sample = tuple[int, str, int, int, int]
"""class, name, index of the shard, offset of the first byte, and size in bytes"""


@dataclass(frozen=True)
class Shards:
    """The images of one split, ordered by class, then by name. About 50 bytes of memory per image."""

    paths: list[str]
    labels: NDArray[np.int32]
    """class of each image, [N]"""
    shards: NDArray[np.int32]
    """index of the shard of each image in `paths`, [N]"""
    starts: NDArray[np.int64]
    """offset of the first byte of each image in its shard, [N]"""
    sizes: NDArray[np.int64]
    """size of each image file in bytes, [N]"""
    names: Ragged
    """names of the members, N of them"""
    passed_over: str
    """what was skipped because it is not an image; see `SkippedFiles`"""
    _open: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """file descriptors of open shards, the most recently used last"""

    def name(self, index: int) -> str:
        """Return the shard of an image and its name there, as a path."""
        return f"{self.paths[self.shards[index]]}/{self.names.text(index)}"

    def content(self, index: int) -> bytes:
        """Return the content of an image file.

        Raises:
            OSError: it cannot be read.
        """
        size = int(self.sizes[index])
        content = os.pread(self._file(int(self.shards[index])), size, int(self.starts[index]))
        if len(content) < size:
            raise OSError("the shard ends before the end of the image")
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
        return self.__dict__ | {"_open": {}}  # another process opens its own files

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the index as arrays, from which `from_arrays` restores it."""
        words = Ragged.of_bytes([os.fsencode(self.passed_over)])
        numbers = {name: getattr(self, name) for name in ("labels", "shards", "starts", "sizes")}
        return numbers | self.names.arrays("names") | words.arrays("passed_over")

    @classmethod
    def from_arrays(cls, paths: list[str], arrays: Arrays) -> "Shards":
        """Restore the index of shards from cached arrays.

        Raises:
            CacheMissError: the arrays are not an index.
        """
        names, words = (Ragged.from_arrays(arrays, name) for name in ("names", "passed_over"))
        labels, shards = (
            cached_numbers(arrays, name, np.int32, len(names), range(limit))
            for name, limit in (("labels", CLASSES), ("shards", len(paths)))
        )
        starts, sizes = (
            cached_numbers(arrays, name, np.int64, len(names), range(2**62)) for name in ("starts", "sizes")
        )
        if len(words) != 1 or not len(names):
            raise CacheMissError("not an index of shards")
        return cls(paths, labels, shards, starts, sizes, names, words.text(0))


def read_shards(paths: Sequence[Path]) -> Shards:
    """Index the images in the shards of one split, or read their index from the cache.

    Raises:
        ValueError: a shard is not a tar file, compressed or damaged; an image has no label; there are no images.
        OSError: a shard cannot be read.
    """
    stamped = stamps(paths)
    kept = cache_folder() / f"shards_{key_of(VERSION, stamped, SUFFIXES)}.npz"
    with suppress(CacheMissError):
        return Shards.from_arrays([*map(str, paths)], load_arrays(kept))
    began = time.time_ns()
    shards = _indexed(paths)
    if is_stable(max(changed for _, _, changed in stamped), began):
        with suppress(OSError):  # without a cache file, the next start indexes the shards again
            save_arrays(kept, shards.arrays())
    return shards


def _indexed(paths: Sequence[Path]) -> Shards:
    passed_over = SkippedFiles()
    samples: list[Sample] = []
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_samples, paths, range(len(paths)))
        quiet = not sys.stderr.isatty()
        for some, others in tqdm(found, "indexing shards", len(paths), leave=False, disable=quiet):
            samples += some
            passed_over.add(others)
    if not samples:
        others_ = f" (skipped {passed_over})" if str(passed_over) else ""
        raise ValueError(f"{printable(str(paths[0]))} and the other shards of its split contain no images{others_}")
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


def _samples(path: Path, shard: int) -> tuple[list[Sample], SkippedFiles]:
    """Return the samples of a shard, and what was skipped."""
    passed_over = SkippedFiles()
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    for member, key, suffix, read in _members(path, passed_over):
        if suffix in SUFFIXES:
            if key in images:
                raise ValueError(f"{printable(str(path))}: two images have the name {printable(key)}")
            images[key] = member
        elif suffix == ".cls":
            labels[key] = _label(path, member.name, read())
        elif suffix == ".json":
            with suppress(ValueError, KeyError, TypeError):  # a JSON file without a label
                labels.setdefault(key, _label(path, member.name, str(json.loads(read())["label"]).encode()))
        else:
            passed_over.by_suffix[suffix or "no suffix"] += 1
    if alone := labels.keys() - images.keys():
        passed_over.by_suffix[".cls"] += len(alone)
    for key, member in images.items():
        if key not in labels:
            raise ValueError(
                f"{printable(str(path))}: {printable(member.name)} has no class: there must be "
                f'{printable(key)}.cls with its index, or {printable(key)}.json with a "label"'
            )
    return [(labels[key], m.name, shard, m.offset_data, m.size) for key, m in images.items()], passed_over


def _members(path: Path, passed_over: SkippedFiles) -> Iterator[tuple[tarfile.TarInfo, str, str, Callable[[], bytes]]]:
    """Yield the files of a shard, each with its key, its suffix in lower case, and a function that reads it."""
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
            raise ValueError(f"{printable(str(path))} is not a tar file, or is damaged ({one_line(error)})") from error


PADDING = 1 << 20
"""Maximum number of zero bytes with which programs fill the last record of a tar file; the default record is 10 KB."""


def _check_head(path: Path, head: bytes) -> None:
    for magic, program in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{printable(str(path))} is compressed by {program}, which does not allow random access; "
                f"shards must be plain tar files"
            )


def _check_end(path: Path, file: int, end: int) -> None:
    """Check the end of a shard.

    Raises:
        ValueError: the last bytes are missing, which tarfile does not notice; or more data follow the end, either
            another shard, or the rest of a file in which a download has left a hole.
    """
    rest = os.pread(file, PADDING + 1, end)
    if rest[:BLOCK] != bytes(BLOCK):
        raise ValueError(f"{printable(str(path))} is truncated or damaged: no end-of-archive mark at byte {end}")
    if len(rest) > PADDING or any(rest):
        raise ValueError(
            f"{printable(str(path))} is damaged or contains several tar files: data follow the end of one at byte {end}"
        )


def _label(path: Path, name: str, content: bytes) -> int:
    text = content.strip()
    if not (text.isdigit() and len(text) < 10 and int(text) < CLASSES):
        raise ValueError(
            f"{printable(str(path))}: {printable(name)} contains {one_line(repr(content[:20])[1:])}; "
            f"must be a class index, 0 to {CLASSES - 1}"
        )
    return int(text)
