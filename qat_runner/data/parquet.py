"""Convert parquet files of the Hugging Face hub to tar shards, once.

An image in a parquet file can only be read together with its row group, which has a hundred images or ten megabytes and
is compressed as a whole. A shuffled epoch would read and decompress all data a hundred times. So each file is converted
to a tar shard in the cache folder, which contains the same images and labels and is as large as the file itself.
"""

import io
import json
import logging
import os
import platform
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qat_runner.cache import chosen_cache
from qat_runner.data.array_cache import key_of, stamps
from qat_runner.data.decoding import SUFFIXES
from qat_runner.data.listing import printable
from qat_runner.errors import one_line

VERSION = 1
"""Version of the shards; it changes whenever the same files would give different shards."""

ROWS = 100
"""Number of rows that are read at a time; the row groups of the hub have this size."""

MARGIN = 1.1
"""Disk space for a shard, as a multiple of the size of its file: the two tar headers of an image take a kilobyte."""

WNID = re.compile(r"_n\d{8}$")
"""The suffix that the hub appends to the names of ImageNet's images; without it, they sort like the official files."""

log = logging.getLogger("qat_runner")


def as_shards(files: Mapping[str, Sequence[Path]]) -> Path:
    """Return a folder in the cache with a tar shard, SPLIT-NUMBER.tar, for each parquet file.

    It also contains classes.txt if the files name their classes. Shards that already exist are not made again, so an
    interrupted conversion resumes with the file at which it stopped.

    Args:
        files: the files of each split, with the columns image (struct of bytes and path) and label (integer).

    Raises:
        ValueError: a file is of another kind or damaged, or the cache folder cannot be written or is too small.
        ModuleNotFoundError: shards have to be made, but pyarrow is not installed.
    """
    stamped = stamps(path for paths in files.values() for path in paths)
    folder = chosen_cache() / f"parquet_{key_of(VERSION, stamped)}"
    wanted = {
        folder / f"{split}-{number:05d}.tar": path
        for split, paths in files.items()
        for number, path in enumerate(paths)
    }
    if not all(shard.exists() for shard in wanted):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder) as alone:
                for left in folder.glob("*.part") if alone else ():  # of processes that were killed
                    left.unlink(missing_ok=True)
                _make(folder, {shard: path for shard, path in wanted.items() if not shard.exists()})
        except OSError as error:
            raise ValueError(
                f"the parquet files cannot be converted to tar shards in {printable(str(folder))} "
                f"({error.strerror or error}); set QAT_CACHE_DIR to use another cache folder"
            ) from error
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lock the folder, so that no other process of this machine makes the same shards at the same time.

    Other processes wait for the lock, and then find the shards made. The context value says whether the lock was
    acquired: some file systems have no locks. There each process makes its own shards, and the last ones remain.
    """
    import fcntl

    with open(folder / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def _make(folder: Path, wanted: Mapping[Path, Path]) -> None:
    """Make the shards of some files; each shard is written atomically."""
    needed, free = MARGIN * sum(path.stat().st_size for path in wanted.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed / 1e9:.1f} GB are needed, but only {free / 1e9:.1f} GB are free")
    for path in [*wanted.values()][:1]:  # empty if another process has made the shards in the meantime
        log.info(f"converting {len(wanted)} parquet files to tar shards in {folder}, once: {needed / 1e9:.1f} GB")
        if names := _class_names(path):
            (folder / "classes.txt").write_text("".join(f"{one_line(name)}\n" for name in names), encoding="utf-8")
    for shard, path in tqdm(wanted.items(), "making shards", leave=False, disable=not sys.stderr.isatty()):
        part = shard.with_name(f"{shard.name}.{platform.node()}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for name, content, label in _rows(path):
                        _add(tar, name, content)
                        _add(tar, f"{os.path.splitext(name)[0]}.cls", str(label).encode())
                file.flush()
                os.fsync(file.fileno())  # a shard with its final name must be complete on disk
            os.replace(part, shard)
        finally:
            part.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _class_names(path: Path) -> list[str]:
    """Return the class names in the metadata of a file of the hub, or an empty list if there are none."""
    from pyarrow import ArrowException, parquet

    with suppress(ArrowException, OSError, ValueError, KeyError, TypeError):  # other writers may store anything there
        said = json.loads(parquet.read_schema(path).metadata[b"huggingface"])
        return [str(name) for name in said["info"]["features"]["label"]["names"]]
    return []


def _rows(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Yield the name, content and label of each image of a file.

    Raises:
        ValueError: the file is of another kind, or damaged.
    """
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            facts = file.read(columns=["label", "image.path"])
            labels = facts["label"].to_pylist()
            names = _names([None if image is None else image["path"] for image in facts["image"].to_pylist()])
            images = (image for batch in file.iter_batches(ROWS, columns=["image.bytes"]) for image in batch["image"])
            for row, (name, label, image) in enumerate(zip(names, labels, images, strict=True)):
                content = (image.as_py() or {}).get("bytes")
                if content is None or label is None or label < 0:
                    missing = "no image" if content is None else "no label"
                    raise ValueError(f"{printable(path.name)}: row {row} has {missing}")
                yield name, content, label
    except (ArrowException, OSError) as error:
        raise ValueError(f"{printable(path.name)} is not a parquet file, or is damaged ({one_line(error)})") from error


def _check_columns(path: Path, schema: Any) -> None:
    wanted = {"image": "struct<bytes: binary, path: string>", "label": "an integer"}
    held = {name: str(schema.field(name).type) if name in schema.names else "missing" for name in wanted}
    if held["image"] != wanted["image"] or not re.fullmatch(r"u?int\d+", held["label"]):
        said, asked = (" and ".join(f"{name} ({kind})" for name, kind in of.items()) for of in (held, wanted))
        raise ValueError(f"{printable(path.name)}: must have the columns {asked}, but has {one_line(said)}")


def _names(paths: Sequence[str | None]) -> list[str]:
    """Return names for the members of a shard: those of the files if all exist and differ, otherwise numbers."""
    stems, suffixes = (
        zip(*(os.path.splitext(os.path.basename(path or "")) for path in paths), strict=True) if paths else ((), ())
    )
    kept = [WNID.sub("", stem).replace(".", "_") for stem in stems]
    if len({*kept}) < len(kept) or not all(kept):
        kept = [f"{row:08d}" for row in range(len(kept))]
    return [
        f"{stem}{suffix if suffix.lower() in SUFFIXES else '.jpg'}" for stem, suffix in zip(kept, suffixes, strict=True)
    ]
