"""Folders of pictures, a folder a class: decoded and augmented in worker processes."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat_runner.data.batches import Shard
from qat_runner.data.decoding import FORMATS, read_picture, read_pixels
from qat_runner.data.images import Labelled, epoch_seed
from qat_runner.data.listing import Listing, list_pictures, printable
from qat_runner.errors import RunError

RESIZE_RATIO = 256 / 224
"""Validation pictures are resized to this times the crop, the ImageNet standard."""

LONGEST = 16
"""Of a validation picture, what lies further from its centre than this ratio of sides is cut off before resizing."""


log = logging.getLogger("qat_runner")


class _Pictures(Dataset[tuple[Tensor, int, str]]):
    """Pictures of one split, asked for as (seed, index): augmentation depends on these two alone.

    An item is a picture [H, W, 3], which is how it lies in memory, its label, and what was wrong with a picture that
    cannot be decoded, or "".

    Args:
        listing: which pictures.
        read: a path -> what `transform` takes.
        transform: makes a tensor uint8 [3, image_size, image_size] of it, by chance of torch's generator.
        image_size: pixels a side.
    """

    def __init__(
        self, listing: Listing, read: Callable[[str], Any], transform: Callable[[Any], Tensor], image_size: int
    ) -> None:
        self.samples = listing.samples
        self.read = read
        self.transform = transform
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: Any) -> tuple[Tensor, int, str]:
        seed, index = item
        path, label = self.samples[index]
        try:
            picture = self.read(path)
        except Exception as error:  # a worker's exception would arrive as its traceback: it is told instead
            trouble = f"picture {printable(path)} cannot be decoded ({_told(error)})"
            return torch.zeros(self.image_size, self.image_size, 3, dtype=torch.uint8), label, trouble
        chance = torch.default_generator  # itself: torch.manual_seed asks after every kind of device, for each picture
        before = chance.get_state()
        try:
            chance.manual_seed(epoch_seed(seed, index))
            return self.transform(picture).permute(1, 2, 0), label, ""
        finally:
            chance.set_state(before)


class _Workers:
    """The processes that decode one split. They live from one epoch to the next; each has its own order all the same.

    Args:
        pictures: of the split.
        most: how many there may be; 0 decodes in this process.
    """

    def __init__(self, pictures: _Pictures, most: int) -> None:
        self._pictures, self._most = pictures, min(most, _processors())
        self._order: list[list[tuple[int, int]]] = []  # which the loader asks for anew at the start of each epoch
        self._loader: Any = None
        self._busy = False

    def batches(self, order: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
        """Batches of items, each given as the (seed, index) of its items. Any number of calls may be under way."""
        workers = min(self._most, len(order))
        if workers == 0 or self._busy:  # the latter: those that live on are in the midst of another call
            yield from self._made(order, workers)
            return
        if self._loader is None or self._loader.num_workers != workers:
            self._loader = self._made(self._order, workers, persistent_workers=True)
        self._order[:] = order
        self._busy = True
        try:
            yield from self._loader
        except Exception:
            self._loader = None  # a worker may have died
            raise
        finally:
            self._busy = False

    def _made(self, order: list[list[tuple[int, int]]], workers: int, **options: Any) -> Any:
        return DataLoader(
            self._pictures,
            batch_sampler=order,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else starting the workers would draw from the global one
            **options,
        )


def _told(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"


def _within_reach(picture: Any) -> Any:
    """The picture, or the middle of a very long one: all of it, resized by its short side, might not fit in memory."""
    from torchvision.transforms.v2 import functional

    sides = functional.get_size(picture)
    longest = LONGEST * min(sides)
    return picture if max(sides) <= longest else functional.center_crop(picture, [min(side, longest) for side in sides])


def _processors() -> int:
    """Those that this process may use: more workers would only stand in each other's way."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FolderSource:
    """A source (see `images.Source`) of FOLDER/train and FOLDER/val.

    Training: a random part of 8 to 100 % of the area, resized, mirrored every other time. Validation: the centre of the
    resized picture.

    Args:
        folder: holds train/ and val/, each with the same class folders.
        image_size: pixels a side of what comes out.
        workers: processes that decode, for each split; 0 decodes in this process.
        skip_corrupt: leave out pictures that cannot be decoded.
        resizing: "pillow" or "tensor"; see `DatasetConfig.resizing`.
        interpolation: "nearest", "bilinear" or "bicubic".
        resize_size: of validation pictures, pixels of the shorter side before the crop; None: by RESIZE_RATIO.

    Raises:
        ValueError: a folder cannot be read, has other classes than the other split's, or a class has no pictures.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        workers: int,
        skip_corrupt: bool = False,
        resizing: str = "pillow",
        interpolation: str = "bilinear",
        resize_size: int | None = None,
    ) -> None:
        from torchvision.transforms import v2  # which takes a second to import

        between = v2.InterpolationMode(interpolation)  # antialias is the default of the published recipes
        read, last = (read_pixels, []) if resizing == "tensor" else (read_picture, [v2.PILToTensor()])
        crop = v2.Compose([v2.RandomResizedCrop(image_size, interpolation=between), v2.RandomHorizontalFlip(), *last])
        resize = v2.Resize(resize_size or round(image_size * RESIZE_RATIO), between)
        center = v2.Compose([_within_reach, resize, v2.CenterCrop(image_size), *last])
        listings = {split: list_pictures(folder / split) for split in ("train", "val")}
        self.classes = listings["train"].classes
        _check_same(self.classes, listings["val"].classes)
        self.notes = tuple(
            f"{split}/: passed over {listing.passed_over}"
            for split, listing in listings.items()
            if str(listing.passed_over)
        )
        self._train, self._val = (
            _Workers(_Pictures(listings[split], read, transform, image_size), workers)
            for split, transform in (("train", crop), ("val", center))
        )
        self.train_size, self.val_size = (len(listings[split].samples) for split in ("train", "val"))
        self.corrupt: set[str] | None = set() if skip_corrupt else None
        """what is wrong with each picture that was left out"""

    def train(self, batch_size: int, seed: int, epoch: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        chance = epoch_seed(seed, epoch)
        order = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(chance)).tolist()
        whole = (order[batch * batch_size : (batch + 1) * batch_size] for batch in batches)
        return self._batches(self._train, [[(chance, index) for index in shard.samples(part)] for part in whole])

    def val(self, batch_size: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        order = range(self.val_size)
        own = (order[batch * batch_size : (batch + 1) * batch_size] for batch in batches if shard.owns(batch))
        return self._batches(self._val, [[(0, index) for index in part] for part in own])

    def _batches(self, split: _Workers, batches: list[list[tuple[int, int]]]) -> Iterator[Labelled]:
        for items, labels, troubles in split.batches(batches):
            pictures = items.permute(0, 3, 1, 2)
            yield self._decoded(pictures, labels, troubles) if any(troubles) else (pictures, labels)

    def _decoded(self, pictures: Tensor, labels: Tensor, troubles: Sequence[str]) -> Labelled:
        """What could be decoded of a batch."""
        told = sorted(set(filter(None, troubles)))
        if self.corrupt is None:
            raise RunError(f"{told[0]}; dataset.skip_corrupt=true leaves such pictures out")
        for trouble in told:
            if trouble not in self.corrupt:
                log.warning(f"{trouble}: left out")
        self.corrupt.update(told)
        good = [i for i, trouble in enumerate(troubles) if not trouble]
        if not good:
            raise RunError(f"none of the {len(troubles)} pictures of a batch can be decoded; {troubles[0]}")
        return pictures[good], labels[good]


def _check_same(train: Sequence[str], val: Sequence[str]) -> None:
    """Refuse splits of different classes, naming the first that one of them has alone."""
    for name in sorted(set(train) ^ set(val)):
        here, there = ("train", "val") if name in train else ("val", "train")
        raise ValueError(
            f"train/ and val/ must have the same class folders: {here}/ has {printable(name)}, {there}/ not"
        )
