"""Image folders in any of the layouts, decoded and augmented in worker processes."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_runner.data.batches import Shard
from qat_runner.data.decoding import decode_image, decode_pixels
from qat_runner.data.images import Labelled
from qat_runner.data.layouts import read_images
from qat_runner.data.seeding import epoch_seed, shuffled
from qat_runner.data.splits import Decoded, OnDevice, Split, TransientTrouble
from qat_runner.data.workers import Order, Workers
from qat_runner.errors import RunError

RESIZE_RATIO = 256 / 224
"""Validation images are resized to this multiple of the crop size, the ImageNet standard."""

LONGEST = 16
"""Longest allowed ratio of the sides of a validation image; longer images are center-cropped to it before resizing."""


log = logging.getLogger("qat_runner")


def _within_reach(image: Any) -> Any:
    """Return the image, or the center of a very long one.

    A very long image that is resized by its shorter side might not fit in memory.
    """
    from torchvision.transforms.v2 import functional

    sides = functional.get_size(image)
    longest = LONGEST * min(sides)
    return image if max(sides) <= longest else functional.center_crop(image, [min(side, longest) for side in sides])


class FolderSource:
    """The train and val splits of an image folder, as an `images.Source`. Batches are the same in every layout.

    Training images are random crops of 8 to 100 % of the area, resized, and flipped horizontally with probability 0.5.
    Validation images are center crops of the resized image.

    Args:
        folder: contains the images as described in `layouts.CONTENT`.
        image_size: side length of the resulting images in pixels.
        workers: number of decoding processes for each split; 0 decodes in this process.
        skip_corrupt: leave out images that cannot be decoded.
        resizing: "pillow" or "tensor"; see `DatasetConfig.resizing`.
        interpolation: "nearest", "bilinear" or "bicubic".
        resize_size: shorter side of validation images before the crop, in pixels; None: determined by RESIZE_RATIO.

    Raises:
        ValueError: a folder or a file cannot be read, the splits have different classes, or a class has no images.
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
        from torchvision.transforms import v2  # deferred: the import takes a second

        between = v2.InterpolationMode(interpolation)  # antialias is the default of the published recipes
        decode, last = (decode_pixels, []) if resizing == "tensor" else (decode_image, [v2.PILToTensor()])
        crop = v2.Compose([v2.RandomResizedCrop(image_size, interpolation=between), v2.RandomHorizontalFlip(), *last])
        resize = v2.Resize(resize_size or round(image_size * RESIZE_RATIO), between)
        center = v2.Compose([_within_reach, resize, v2.CenterCrop(image_size), *last])
        stored = read_images(folder)
        self.classes = stored.classes
        skipped = [
            f"{split}/: skipped {which.passed_over}" for split, which in stored.splits.items() if which.passed_over
        ]
        self.notes = (*filter(None, [stored.note]), *skipped)
        self.train_size, self.val_size = (len(stored.splits[split].labels) for split in ("train", "val"))

        self._most = workers
        self._images = {
            split: Decoded(stored.splits[split], decode, transform, image_size)
            for split, transform in (("train", crop), ("val", center))
        }
        self._splits: dict[str, Split] = {split: Workers(which, workers) for split, which in self._images.items()}
        self.corrupt: set[str] | None = set() if skip_corrupt else None
        """for each image that was left out, a message that says why"""

    def decode_on(self, device: torch.device) -> None:
        """Decode JPEGs and resize all images on a device; workers only read files. Requires resizing="tensor"."""
        self._splits = {split: OnDevice(which, self._most, device) for split, which in self._images.items()}

    def train(self, batch_size: int, seed: int, epoch: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        chance = epoch_seed(seed, epoch)
        order = shuffled(self.train_size, chance)

        def items(batch: int) -> list[tuple[int, int]]:
            part = shard.samples(order[batch * batch_size : (batch + 1) * batch_size])
            return [(chance, index) for index in part.tolist()]

        return self._batches("train", Order(batches, items))

    def val(self, batch_size: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        order = range(self.val_size)

        def items(batch: int) -> list[tuple[int, int]]:  # no self: a reference cycle would delay the workers' end
            return [(0, index) for index in order[batch * batch_size : (batch + 1) * batch_size]]

        return self._batches("val", Order([batch for batch in batches if shard.owns(batch)], items), shard.world == 1)

    def _batches(self, split: str, order: Order, all_of_it: bool = False) -> Iterator[Labelled]:
        decoded, trouble = False, ""
        for items, labels, troubles in self._splits[split].batches(order):
            images = items.permute(0, 3, 1, 2)
            if any(troubles):
                images, labels = self._decoded(images, labels, troubles)
                trouble = max(troubles)
            if len(labels):
                decoded = True
                yield images, labels
            elif split == "train":  # each process must contribute to each step
                raise RunError(f"none of the {len(troubles)} images of a batch can be decoded; {trouble}")
        if trouble and not decoded and all_of_it:
            raise RunError(f"no image of {split} can be decoded; {trouble}")

    def _decoded(self, images: Tensor, labels: Tensor, troubles: Sequence[str]) -> Labelled:
        """Return the images of a batch that could be decoded (possibly none), and log the others."""
        distinct = sorted(set(filter(None, troubles)))
        if unread := [trouble for trouble in distinct if isinstance(trouble, TransientTrouble)]:
            raise RunError(unread[0])
        if self.corrupt is None:
            raise RunError(f"{distinct[0]}; set dataset.skip_corrupt=true to leave out such images")
        for trouble in distinct:
            if trouble not in self.corrupt:
                log.warning(f"{trouble}: left out")
        self.corrupt.update(distinct)
        good = [i for i, trouble in enumerate(troubles) if not trouble]
        return images[good], labels[good]
