"""Convert images and labels in the usual NumPy formats to bytes and class indices for training."""

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
"""allowed numbers of channels of an image"""


def labelled(name: str, images: NDArray[Any], labels: NDArray[Any]) -> tuple[Labelled, tuple[str, ...]]:
    """Convert images and their labels to the common format `Labelled`.

    Args:
        name: name of the split, for messages.
        images: images [N, H, H, C], [N, C, H, H] or [N, H, H] with C of 1 or 3; values as `as_bytes` takes them.
        labels: [N] or [N, 1], class indices from 0, as whole numbers of any type.

    Returns:
        Images and labels, and notes on inputs that were interpreted as something other than bytes [N, H, H, C].

    Raises:
        ValueError: shapes or values are not allowed, or a shape is ambiguous.
    """
    try:
        values = as_bytes(_channels_first(images))
    except ValueError as error:
        raise ValueError(f"the images of {name}: {error}") from None
    try:
        classes = _class_numbers(labels)
    except ValueError as error:
        raise ValueError(f"the labels of {name}: {error}") from None
    if len(values) != len(classes):
        raise ValueError(f"{name} has {len(values)} images, but {len(classes)} labels")
    notes = []
    if images.dtype != np.uint8:
        scale = "0..1" if images.dtype.kind == "f" and images.max() <= 1 else "0..255"
        notes.append(f"{name}: {images.dtype} images are interpreted as {scale}")
    if images.ndim == 4 and values.shape == images.shape:
        notes.append(f"{name}: images {list(images.shape)} are interpreted as [N, C, H, W]")
    return (torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(classes)), tuple(notes)


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    """Return a view of the images, [N, C, H, H].

    Raises:
        ValueError: the array does not contain numbers, or its shape is not allowed.
    """
    if images.dtype.kind not in "iuf":
        raise ValueError(f"type is {images.dtype}; must be numbers")
    shape, allowed = list(images.shape), "must be [N, H, H, C], [N, C, H, H] or [N, H, H] with C of 1 or 3"
    if 0 in shape:
        raise ValueError(f"shape is {shape}; must not be empty")
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise ValueError(f"shape is {shape}; {allowed}")
    first, last = images.shape[1] in CHANNELS, images.shape[3] in CHANNELS
    if first and last and len(shape) == 4:
        raise ValueError(f"shape is {shape}, which is ambiguous: the channels may be first or last")
    if not first:
        images = images.transpose(0, 3, 1, 2)
    _, channels, height, width = images.shape
    if channels not in CHANNELS or height != width:
        raise ValueError(f"shape is {shape}; {allowed}")
    return images


def _class_numbers(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Convert labels [N] or [N, 1] to class indices [N].

    Raises:
        ValueError: the shape is not allowed, or values are not whole numbers from 0.
    """
    if labels.dtype.kind not in "iuf":
        raise ValueError(f"type is {labels.dtype}; must be class indices")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(
            f"shape is {list(labels.shape)}, probably one-hot; must be class indices [N] (labels.argmax(1))"
        )
    if labels.ndim not in (1, 2):
        raise ValueError(f"shape is {list(labels.shape)}; must be [N] or [N, 1]")
    labels = labels.reshape(-1)
    values = labels.astype(np.float64)
    good = (values >= 0) & (values < 2**31) & (np.rint(values) == values)  # all False for NaN
    if not good.all():
        raise ValueError(f"values contain {labels[~good][0]}; must be class indices from 0")
    return labels.astype(np.int64)


def read_npz(path: Path, names: Sequence[str]) -> list[NDArray[Any]]:
    """Read arrays from an .npz file.

    Nothing is unpickled, and the arrays are read only after the check that all of them fit in memory.

    Raises:
        ValueError: an array is missing, does not contain plain numbers, or the arrays are too large.
        zipfile.BadZipFile, zlib.error: the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [name for name in names if name not in held]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; it contains {held[:10]!a}")
        wanted = sum(_checked_size(archive, name) for name in names)
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # half: the conversion makes copies
        if wanted > limit:
            raise ValueError(f"{path.name} contains {wanted / 1e9:.0f} GB, more than half of this machine's memory")
        return [_read(archive, name) for name in names]


def _checked_size(archive: zipfile.ZipFile, name: str) -> int:
    """Return the size of an array in bytes from its header, after checking it against the size of the member."""
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _header(member)
        if dtype.hasobject:
            raise ValueError(f"{name} contains Python objects; only numbers are loaded")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        there = archive.getinfo(f"{name}.npy").file_size - member.tell()
        if min(shape, default=1) < 0 or size != there:
            raise ValueError(f"{name} has shape {list(shape)} and should have {size} bytes, but has {there}")
        return size


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(member)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:  # version 3.0 exists for field names, which arrays of numbers do not have
        raise ValueError(f"version {version} of the .npy format is not supported; must be (1, 0) or (2, 0)")
    shape, _, dtype = read(member)
    return shape, dtype


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        array: NDArray[Any] = npy.read_array(member, allow_pickle=False)
        return array
