"""Parquet files of the Hugging Face hub, made once into tar shards.

Such a file gives up a picture only together with its row group, a hundred pictures or ten megabytes, compressed as one
piece. A shuffled epoch would read, and unpack, all data a hundred times. So each file is copied into a shard that holds
the same pictures and labels, in the cache folder, as large as the file itself.
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
from qat_runner.data.decoding import SUFFIXES
from qat_runner.data.kept import key_of, stamps
from qat_runner.data.listing import printable
from qat_runner.errors import told

VERSION = 1
"""Of the shards; another one wherever they would be other ones."""

ROWS = 100
"""Read at a time; the hub's row groups are of so many."""

MARGIN = 1.1
"""Room for a shard, of the size of its file: a picture's two heads take a kilobyte."""

WNID = re.compile(r"_n\d{8}$")
"""What the hub appends to the names of ImageNet's pictures: without it they have the order of ImageNet's own files."""

log = logging.getLogger("qat_runner")


def as_shards(files: Mapping[str, Sequence[Path]]) -> Path:
    """A folder in the cache with a tar shard for each file, SPLIT-NUMBER.tar, and classes.txt where they name classes.

    What is there already is not made again; an interrupted copy goes on with the file that it was at.

    Args:
        files: of each split, with the columns image (struct of bytes and path) and label (whole number).

    Raises:
        ValueError: a file is something else, or damaged; the cache folder cannot be written, or is too small.
        ModuleNotFoundError: shards have to be made, and pyarrow is not installed.
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
                f"tar shards cannot be made of its parquet files in {printable(str(folder))} "
                f"({error.strerror or error}); QAT_CACHE_DIR names another cache folder"
            ) from error
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """While open, no other process of this machine makes the same shards; it waits here, and then finds them made.

    Given is whether that is so: some file systems have no locks, and there each makes its own, and the last one's stay.
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
    """The shards of some files, each whole or not at all."""
    needed, free = MARGIN * sum(path.stat().st_size for path in wanted.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")
    for path in [*wanted.values()][:1]:  # none where another process has made them meanwhile
        log.info(f"{len(wanted)} parquet files are made into tar shards in {folder}, once: {needed / 1e9:.1f} GB")
        if names := _class_names(path):
            (folder / "classes.txt").write_text("".join(f"{told(name)}\n" for name in names), encoding="utf-8")
    for shard, path in tqdm(wanted.items(), "making shards", leave=False, disable=not sys.stderr.isatty()):
        part = shard.with_name(f"{shard.name}.{platform.node()}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for name, content, label in _rows(path):
                        _add(tar, name, content)
                        _add(tar, f"{os.path.splitext(name)[0]}.cls", str(label).encode())
                file.flush()
                os.fsync(file.fileno())  # its name is to say that it is whole
            os.replace(part, shard)
        finally:
            part.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _class_names(path: Path) -> list[str]:
    """The names that a file of the hub has for its labels; none where it does not say."""
    from pyarrow import ArrowException, parquet

    with suppress(ArrowException, OSError, ValueError, KeyError, TypeError):  # whatever others write there
        said = json.loads(parquet.read_schema(path).metadata[b"huggingface"])
        return [str(name) for name in said["info"]["features"]["label"]["names"]]
    return []


def _rows(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Name, content and label of each picture of a file.

    Raises:
        ValueError: the file is something else, or damaged.
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
                    missing = "no picture" if content is None else "no label"
                    raise ValueError(f"{printable(path.name)}: row {row} holds {missing}")
                yield name, content, label
    except (ArrowException, OSError) as error:
        raise ValueError(f"{printable(path.name)} is no parquet file, or damaged ({told(error)})") from error


def _check_columns(path: Path, schema: Any) -> None:
    wanted = {"image": "struct<bytes: binary, path: string>", "label": "a whole number"}
    held = {name: str(schema.field(name).type) if name in schema.names else "missing" for name in wanted}
    if held["image"] != wanted["image"] or not re.fullmatch(r"u?int\d+", held["label"]):
        said, asked = (" and ".join(f"{name} ({kind})" for name, kind in of.items()) for of in (held, wanted))
        raise ValueError(f"{printable(path.name)}: must have the columns {asked}, and has {told(said)}")


def _names(paths: Sequence[str | None]) -> list[str]:
    """Names of members after those of files, where these are there and differ; otherwise by number."""
    stems, suffixes = (
        zip(*(os.path.splitext(os.path.basename(path or "")) for path in paths), strict=True) if paths else ((), ())
    )
    kept = [WNID.sub("", stem).replace(".", "_") for stem in stems]
    if len({*kept}) < len(kept) or not all(kept):
        kept = [f"{row:08d}" for row in range(len(kept))]
    return [
        f"{stem}{suffix if suffix.lower() in SUFFIXES else '.jpg'}" for stem, suffix in zip(kept, suffixes, strict=True)
    ]
