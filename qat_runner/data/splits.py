"""Pictures of one split as batches of bytes: decoded and transformed by worker processes, or on a device."""

from collections.abc import Callable, Iterator, Sequence
from errno import EACCES, EISDIR, ELOOP, ENODEV, ENOENT, ENOTDIR, ENXIO, EPERM
from typing import Any, Protocol

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from qat_runner.data.chance import drawing, epoch_seed
from qat_runner.data.decoding import FORMATS, as_tensor, decode_pixels, jpeg_pixels, plain_jpeg
from qat_runner.data.layouts import Pictures
from qat_runner.data.listing import printable
from qat_runner.data.workers import Order, Workers

Pixels = tuple[Tensor, Tensor, Sequence[str]]
"""A batch: pictures uint8 [N, S, S, 3], which is how they lie in memory; labels [N]; what is wrong with each, or "".

What is wrong is `Unread` where it is no matter of the picture.
"""

File = tuple[Tensor, bool, int, str, tuple[int, int]]
"""A picture yet to decode: its file uint8 [length], whether a plain JPEG, label, what is wrong, (seed, index)"""

Transform = Callable[[Any], Tensor]
"""A decoded picture -> uint8 [3, S, S], by chance of torch's generator"""


class Unread(str):
    """Why a picture could not be read, where that says nothing of the picture: too many open files, no memory."""


class Split(Protocol):
    """Batches of one split."""

    def batches(self, order: Order) -> Iterator[Pixels]:
        """Batches of the pictures of an order. Any number of calls may be under way."""


class Decoded(Dataset[tuple[Tensor, int, str]]):
    """Pictures of one split, decoded and transformed: the items of `Pixels`, by (seed, index).

    Args:
        stored: as they lie on the disk.
        decode: makes of the content of a file what `transform` takes.
        transform: makes a tensor of it.
        image_size: S.
    """

    def __init__(self, stored: Pictures, decode: Callable[[bytes], Any], transform: Transform, image_size: int) -> None:
        self.stored = stored
        self.decode = decode
        self.transform = transform
        self.image_size = image_size

    def __getitem__(self, item: Any) -> tuple[Tensor, int, str]:
        _, index = item
        label = int(self.stored.labels[index])
        try:
            picture = self.decode(self.stored.content(index))
        except Exception as error:  # a worker's exception would arrive as its traceback: it is told instead
            black = torch.zeros(self.image_size, self.image_size, 3, dtype=torch.uint8)
            return black, label, _trouble(self.stored, index, error)
        return transformed(picture, self.transform, item).permute(1, 2, 0), label, ""


class Files(Dataset[File]):
    """Pictures of one split as their files, by (seed, index).

    Args:
        stored: as they lie on the disk.
    """

    def __init__(self, stored: Pictures) -> None:
        self.stored = stored

    def __getitem__(self, item: Any) -> File:
        _, index = item
        label = int(self.stored.labels[index])
        try:
            content = self.stored.content(index)
            return as_tensor(content), plain_jpeg(content), label, "", item
        except Exception as error:
            return torch.empty(0, dtype=torch.uint8), False, label, _trouble(self.stored, index, error), item


class OnDevice:
    """A split whose JPEGs are decoded on a device, where all its pictures are transformed; workers only read.

    What is no plain JPEG is decoded here, on the CPU.

    Args:
        pictures: whose transform takes pixels as `decode_pixels` gives them.
        workers: processes; 0 reads in this one.
        device: which decodes.
    """

    def __init__(self, pictures: Decoded, workers: int, device: torch.device) -> None:
        self.stored, self.transform, self.image_size = pictures.stored, pictures.transform, pictures.image_size
        self.device = device
        self._workers = Workers(Files(pictures.stored), workers, collate=list)

    def batches(self, order: Order) -> Iterator[Pixels]:
        for files in self._workers.batches(order):
            pictures, troubles = zip(*self._pictures(files), strict=True)
            yield torch.stack(pictures).permute(0, 2, 3, 1), torch.tensor([file[2] for file in files]), troubles

    def _pictures(self, files: list[File]) -> Iterator[tuple[Tensor, str]]:
        """Each as a tensor [3, S, S], and what is wrong with it."""
        jpegs = iter(self._jpegs([content for content, plain, *_ in files if plain]))
        for content, plain, _, trouble, item in files:
            pixels = next(jpegs) if plain else None
            try:
                if pixels is None and not trouble:
                    pixels = decode_pixels(content.numpy().tobytes())
            except Exception as error:
                trouble = _trouble(self.stored, item[1], error)
            if pixels is None:
                yield torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8, device=self.device), trouble
            else:
                yield transformed(pixels.to(self.device), self.transform, item), ""

    def _jpegs(self, jpegs: list[Tensor]) -> Sequence[Tensor | None]:
        """Their pixels; None for a damaged one, of which Pillow knows what is wrong with it."""
        try:
            return jpeg_pixels(jpegs, self.device) if jpegs else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # which does not tell whose
            return [None] if len(jpegs) == 1 else [pixels for jpeg in jpegs for pixels in self._jpegs([jpeg])]


def transformed(picture: Any, transform: Transform, item: tuple[int, int]) -> Tensor:
    """A picture through a transform, by the chance of its (seed, index); torch's generator is left as it was."""
    with drawing(epoch_seed(*item)):
        return transform(picture)


def _trouble(stored: Pictures, index: int, error: Exception) -> str:
    name = printable(stored.name(index))
    elsewhere = isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE
    if elsewhere or isinstance(error, MemoryError):
        return Unread(f"picture {name} cannot be read ({_told(error)})")
    return f"picture {name} cannot be decoded ({_told(error)})"


_OF_THE_FILE = (ENOENT, EACCES, EPERM, EISDIR, ENOTDIR, ELOOP, ENXIO, ENODEV)
"""Errors of the operating system that stay with a file however often it is read; decoders raise none."""


def _told(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
