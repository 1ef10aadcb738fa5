"""Images of one split as batches of bytes, decoded and transformed by worker processes or on a device."""

from collections.abc import Callable, Iterator, Sequence
from errno import EACCES, EISDIR, ELOOP, ENODEV, ENOENT, ENOTDIR, ENXIO, EPERM
from typing import Any, Protocol

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from qat_runner.data.decoding import FORMATS, as_tensor, decode_pixels, jpeg_pixels, plain_jpeg
from qat_runner.data.layouts import Images
from qat_runner.data.listing import printable
from qat_runner.data.seeding import epoch_seed, seeded
from qat_runner.data.workers import Order, Workers

Pixels = tuple[Tensor, Tensor, Sequence[str]]
"""A batch: images uint8 [N, S, S, 3], contiguous in this order; labels [N]; an error message for each image, or "".

An error message is a `TransientTrouble` where the cause is not the image itself.
"""

File = tuple[Tensor, bool, int, str, tuple[int, int]]
"""An image before decoding: its file uint8 [length], whether it is a plain JPEG, label, error message, (seed, index)"""

Transform = Callable[[Any], Tensor]
"""Maps a decoded image to uint8 [3, S, S], with random numbers from torch's global generator"""


class TransientTrouble(str):
    """An error message for an image that could not be read for a reason unrelated to the image.

    Examples are too many open files, or not enough memory.
    """


class Split(Protocol):
    """A split that can be read in batches."""

    def batches(self, order: Order) -> Iterator[Pixels]:
        """Yield the batches of an order. Several calls may be in progress at the same time."""


class Decoded(Dataset[tuple[Tensor, int, str]]):
    """Decoded and transformed images of one split: the items of `Pixels`, addressed by (seed, index).

    Args:
        stored: the images on disk.
        decode: converts the content of a file to the input of `transform`.
        transform: converts the decoded image to a tensor.
        image_size: side length of the transformed images in pixels, S.
    """

    def __init__(self, stored: Images, decode: Callable[[bytes], Any], transform: Transform, image_size: int) -> None:
        self.stored = stored
        self.decode = decode
        self.transform = transform
        self.image_size = image_size

    def __getitem__(self, item: Any) -> tuple[Tensor, int, str]:
        _, index = item
        label = int(self.stored.labels[index])
        try:
            image = self.decode(self.stored.content(index))
        except Exception as error:  # a worker's exception would arrive as a traceback; a message is returned instead
            black = torch.zeros(self.image_size, self.image_size, 3, dtype=torch.uint8)
            return black, label, _trouble(self.stored, index, error)
        return transformed(image, self.transform, item).permute(1, 2, 0), label, ""


class Files(Dataset[File]):
    """Files of the images of one split, addressed by (seed, index).

    Args:
        stored: the images on disk.
    """

    def __init__(self, stored: Images) -> None:
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
    """A split whose JPEGs are decoded, and whose images are all transformed, on a device; workers only read files.

    Images that are not plain JPEGs are decoded on the CPU, in this process.

    Args:
        images: the images; their transform takes pixels in the format of `decode_pixels`.
        workers: number of reading processes; 0 reads in this process.
        device: the device that decodes.
    """

    def __init__(self, images: Decoded, workers: int, device: torch.device) -> None:
        self.stored, self.transform, self.image_size = images.stored, images.transform, images.image_size
        self.device = device
        self._workers = Workers(Files(images.stored), workers, collate=list)

    def batches(self, order: Order) -> Iterator[Pixels]:
        for files in self._workers.batches(order):
            images, troubles = zip(*self._images(files), strict=True)
            yield torch.stack(images).permute(0, 2, 3, 1), torch.tensor([file[2] for file in files]), troubles

    def _images(self, files: list[File]) -> Iterator[tuple[Tensor, str]]:
        """Yield each image as a tensor [3, S, S], and its error message."""
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
        """Decode JPEGs; the result is None for damaged ones, for which Pillow will report what is wrong."""
        try:
            return jpeg_pixels(jpegs, self.device) if jpegs else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the error does not say which JPEG is damaged
            return [None] if len(jpegs) == 1 else [pixels for jpeg in jpegs for pixels in self._jpegs([jpeg])]


def transformed(image: Any, transform: Transform, item: tuple[int, int]) -> Tensor:
    """Transform an image with random numbers that depend only on its (seed, index); restore torch's generator."""
    with seeded(epoch_seed(*item)):
        return transform(image)


def _trouble(stored: Images, index: int, error: Exception) -> str:
    name = printable(stored.name(index))
    elsewhere = isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE
    if elsewhere or isinstance(error, MemoryError):
        return TransientTrouble(f"image {name} cannot be read ({_describe(error)})")
    return f"image {name} cannot be decoded ({_describe(error)})"


_OF_THE_FILE = (ENOENT, EACCES, EPERM, EISDIR, ENOTDIR, ELOOP, ENXIO, ENODEV)
"""Operating system errors that belong to a file and occur on every read; decoders do not raise them."""


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not one of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
