"""Pictures and labels as people keep them in NumPy arrays, as the bytes and class numbers that networks learn from."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from qat_runner.data.brightness import as_bytes
from qat_runner.data.images import Labelled

CHANNELS = (1, 3)
"""how many a picture may have"""


def labelled(name: str, pictures: NDArray[Any], labels: NDArray[Any]) -> tuple[Labelled, tuple[str, ...]]:
    """Pictures and their labels in one form.

    Args:
        name: of the split, for messages.
        pictures: [N, H, H, C], [N, C, H, H] or [N, H, H] with C of 1 or 3: values as `as_bytes` takes them.
        labels: [N] or [N, 1]: class numbers from 0, of any type as long as they are whole.

    Returns:
        Pictures and labels, and notes of what was taken for something else than bytes [N, H, H, C].

    Raises:
        ValueError: they have other shapes or values, or shapes that can be read in two ways.
    """
    try:
        values = as_bytes(_channels_first(pictures))
    except ValueError as error:
        raise ValueError(f"the pictures of {name}: {error}") from None
    try:
        classes = _class_numbers(labels)
    except ValueError as error:
        raise ValueError(f"the labels of {name}: {error}") from None
    if len(values) != len(classes):
        raise ValueError(f"{name} has {len(values)} pictures and {len(classes)} labels")
    notes = []
    if pictures.dtype != np.uint8:
        scale = "0..1" if pictures.dtype.kind == "f" and pictures.max() <= 1 else "0..255"
        notes.append(f"{name}: pictures of {pictures.dtype} are taken as {scale}")
    if pictures.ndim == 4 and values.shape == pictures.shape:
        notes.append(f"{name}: pictures {list(pictures.shape)} are taken as [N, C, H, W]")
    return (torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(classes)), tuple(notes)


def _channels_first(pictures: NDArray[Any]) -> NDArray[Any]:
    """A view [N, C, H, H].

    Raises:
        ValueError: no numbers, or another shape.
    """
    if pictures.dtype.kind not in "iuf":
        raise ValueError(f"of type {pictures.dtype}, not numbers")
    shape, allowed = list(pictures.shape), "[N, H, H, C], [N, C, H, H] or [N, H, H] with C of 1 or 3 is allowed"
    if 0 in shape:
        raise ValueError(f"none, with the shape {shape}")
    if pictures.ndim == 3:
        pictures = pictures[:, None]
    if pictures.ndim != 4:
        raise ValueError(f"of the shape {shape}; {allowed}")
    first, last = pictures.shape[1] in CHANNELS, pictures.shape[3] in CHANNELS
    if first and last and len(shape) == 4:
        raise ValueError(f"of the shape {shape}, where the channels may be first or last")
    if not first:
        pictures = pictures.transpose(0, 3, 1, 2)
    _, channels, height, width = pictures.shape
    if channels not in CHANNELS or height != width:
        raise ValueError(f"of the shape {shape}; {allowed}")
    return pictures


def _class_numbers(labels: NDArray[Any]) -> NDArray[np.int64]:
    """[N], from labels [N] or [N, 1].

    Raises:
        ValueError: another shape, or no whole numbers from 0.
    """
    if labels.dtype.kind not in "iuf":
        raise ValueError(f"of type {labels.dtype}, not class numbers")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(
            f"one-hot it seems, of the shape {list(labels.shape)}; class numbers [N] are needed (labels.argmax(1))"
        )
    if labels.ndim not in (1, 2):
        raise ValueError(f"of the shape {list(labels.shape)}; [N] or [N, 1] is allowed")
    labels = labels.reshape(-1)
    values = labels.astype(np.float64)
    good = (values >= 0) & (values < 2**31) & (np.rint(values) == values)  # NaN is none of these
    if not good.all():
        raise ValueError(f"{labels[~good][0]} among them; class numbers from 0 are needed")
    return labels.astype(np.int64)


def read_npz(path: Path, names: Sequence[str]) -> list[NDArray[Any]]:
    """Arrays of an .npz file. Nothing is unpickled, and nothing is read before all of it is known to fit in memory.

    Raises:
        ValueError: it lacks some of the arrays, or holds something else than arrays of numbers, or too many of them.
        zipfile.BadZipFile, zlib.error: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [name for name in names if name not in held]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; it holds {held[:10]!a}")
        wanted = sum(_checked_size(archive, name) for name in names)
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # they are converted: twice as much
        if wanted > limit:
            raise ValueError(f"{path.name} holds {wanted / 1e9:.0f} GB, more than half of this machine's memory")
        return [_read(archive, name) for name in names]


def _checked_size(archive: zipfile.ZipFile, name: str) -> int:
    """Bytes of an array, as its header has them."""
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _header(member)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not loaded: only numbers are")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        there = archive.getinfo(f"{name}.npy").file_size - member.tell()
        if min(shape, default=1) < 0 or size != there:
            raise ValueError(f"{name} has the shape {list(shape)} and should take {size} bytes, but takes {there}")
        return size


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(member)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:  # 3.0 is for names of fields, which numbers do not have
        raise ValueError(f"version {version} of the .npy format is not for plain numbers")
    shape, _, dtype = read(member)
    return shape, dtype


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        array: NDArray[Any] = npy.read_array(member, allow_pickle=False)
        return array
