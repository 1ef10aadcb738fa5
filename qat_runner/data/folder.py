"""Folders of pictures, in any of the layouts: decoded and augmented in worker processes."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_runner.data.batches import Shard
from qat_runner.data.chance import epoch_seed, shuffled
from qat_runner.data.decoding import decode_picture, decode_pixels
from qat_runner.data.images import Labelled
from qat_runner.data.layouts import read_pictures
from qat_runner.data.splits import Decoded, OnDevice, Split, Unread
from qat_runner.data.workers import Order, Workers
from qat_runner.errors import RunError

RESIZE_RATIO = 256 / 224
"""Validation pictures are resized to this times the crop, the ImageNet standard."""

LONGEST = 16
"""Of a validation picture, what lies further from its centre than this ratio of sides is cut off before resizing."""


log = logging.getLogger("qat_runner")


def _within_reach(picture: Any) -> Any:
    """The picture, or the middle of a very long one: all of it, resized by its short side, might not fit in memory."""
    from torchvision.transforms.v2 import functional

    sides = functional.get_size(picture)
    longest = LONGEST * min(sides)
    return picture if max(sides) <= longest else functional.center_crop(picture, [min(side, longest) for side in sides])


class FolderSource:
    """A source (see `images.Source`) of a folder's train and val, in any layout; batches are the same in all of them.

    Training: a random part of 8 to 100 % of the area, resized, mirrored every other time. Validation: the centre of the
    resized picture.

    Args:
        folder: holds the pictures as `layouts.CONTENT` says.
        image_size: pixels a side of what comes out.
        workers: processes that decode, for each split; 0 decodes in this process.
        skip_corrupt: leave out pictures that cannot be decoded.
        resizing: "pillow" or "tensor"; see `DatasetConfig.resizing`.
        interpolation: "nearest", "bilinear" or "bicubic".
        resize_size: of validation pictures, pixels of the shorter side before the crop; None: by RESIZE_RATIO.

    Raises:
        ValueError: a folder or a file cannot be read, the splits have other classes, or a class has no pictures.
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
        decode, last = (decode_pixels, []) if resizing == "tensor" else (decode_picture, [v2.PILToTensor()])
        crop = v2.Compose([v2.RandomResizedCrop(image_size, interpolation=between), v2.RandomHorizontalFlip(), *last])
        resize = v2.Resize(resize_size or round(image_size * RESIZE_RATIO), between)
        center = v2.Compose([_within_reach, resize, v2.CenterCrop(image_size), *last])
        stored = read_pictures(folder)
        self.classes = stored.classes
        told = [
            f"{split}/: passed over {which.passed_over}" for split, which in stored.splits.items() if which.passed_over
        ]
        self.notes = (*filter(None, [stored.note]), *told)
        self.train_size, self.val_size = (len(stored.splits[split].labels) for split in ("train", "val"))

        self._most = workers
        self._pictures = {
            split: Decoded(stored.splits[split], decode, transform, image_size)
            for split, transform in (("train", crop), ("val", center))
        }
        self._splits: dict[str, Split] = {split: Workers(which, workers) for split, which in self._pictures.items()}
        self.corrupt: set[str] | None = set() if skip_corrupt else None
        """what is wrong with each picture that was left out"""

    def decode_on(self, device: torch.device) -> None:
        """Have JPEGs decoded, and all pictures resized, on a device; workers only read. For resizing="tensor"."""
        self._splits = {split: OnDevice(which, self._most, device) for split, which in self._pictures.items()}

    def train(self, batch_size: int, seed: int, epoch: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        chance = epoch_seed(seed, epoch)
        order = shuffled(self.train_size, chance)

        def items(batch: int) -> list[tuple[int, int]]:
            part = shard.samples(order[batch * batch_size : (batch + 1) * batch_size])
            return [(chance, index) for index in part.tolist()]

        return self._batches("train", Order(batches, items))

    def val(self, batch_size: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        order = range(self.val_size)

        def items(batch: int) -> list[tuple[int, int]]:  # without self: workers in a circle of references end late
            return [(0, index) for index in order[batch * batch_size : (batch + 1) * batch_size]]

        return self._batches("val", Order([batch for batch in batches if shard.owns(batch)], items), shard.world == 1)

    def _batches(self, split: str, order: Order, all_of_it: bool = False) -> Iterator[Labelled]:
        decoded, trouble = False, ""
        for items, labels, troubles in self._splits[split].batches(order):
            pictures = items.permute(0, 3, 1, 2)
            if any(troubles):
                pictures, labels = self._decoded(pictures, labels, troubles)
                trouble = max(troubles)
            if len(labels):
                decoded = True
                yield pictures, labels
            elif split == "train":  # each process has a part of each step
                raise RunError(f"none of the {len(troubles)} pictures of a batch can be decoded; {trouble}")
        if trouble and not decoded and all_of_it:
            raise RunError(f"no picture of {split} can be decoded; {trouble}")

    def _decoded(self, pictures: Tensor, labels: Tensor, troubles: Sequence[str]) -> Labelled:
        """What could be decoded of a batch, perhaps nothing."""
        told = sorted(set(filter(None, troubles)))
        if unread := [trouble for trouble in told if isinstance(trouble, Unread)]:
            raise RunError(unread[0])
        if self.corrupt is None:
            raise RunError(f"{told[0]}; dataset.skip_corrupt=true leaves such pictures out")
        for trouble in told:
            if trouble not in self.corrupt:
                log.warning(f"{trouble}: left out")
        self.corrupt.update(told)
        good = [i for i, trouble in enumerate(troubles) if not trouble]
        return pictures[good], labels[good]
