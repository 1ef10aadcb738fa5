"""Image data sets as batches of normalized images.

Order and augmentation depend only on (seed, epoch), so an epoch can be repeated exactly, whatever came before it.
Small data sets are held in memory and augmented one batch at a time; image folders are decoded by worker processes.
Both deliver bytes, which are normalized on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qat_runner.data.batches import WHOLE, Batch, Shard, to_device
from qat_runner.data.seeding import epoch_seed, shuffled

AUGMENTATIONS = ("none", "crop", "crop_flip")
"""Augmentations of images in memory: crop shifts by up to an eighth of the side; crop_flip also flips horizontally
with probability 0.5."""

Labelled = tuple[Tensor, Tensor]
"""images uint8 [N, C, H, W], labels int64 [N]"""


class Source(Protocol):
    """A source of images: both splits of a data set, as bytes."""

    train_size: int
    val_size: int
    notes: tuple[str, ...]
    """what was skipped, or interpreted in a way that the data do not state"""
    corrupt: set[str] | None
    """as in `Data`"""

    def train(self, batch_size: int, seed: int, epoch: int, batches: range, shard: Shard) -> Iterator[Labelled]: ...

    def val(self, batch_size: int, batches: range, shard: Shard) -> Iterator[Labelled]: ...


@dataclass
class ImageData:
    """Images to classify, as `Data`.

    Inputs are normalized images, float32 [N, 3, image_size, image_size]; targets are int64 [N].
    """

    name: str
    num_classes: int
    image_size: int
    source: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    seed: int
    channels_last: bool = False
    """whether the batches have the channels_last memory layout"""
    shard: Shard = WHOLE
    interpolation: str = "bilinear"
    """nearest, bilinear or bicubic: how images that are smaller than image_size are enlarged"""

    @property
    def train_size(self) -> int:
        return self.source.train_size

    @property
    def val_size(self) -> int:
        return self.source.val_size

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    @property
    def corrupt(self) -> set[str] | None:
        return self.source.corrupt

    def train_steps(self, batch_size: int) -> int:
        """Number of batches in an epoch, at least one: only full ones, so that BatchNorm never sees a partial batch."""
        return max(self.train_size // batch_size, 1)

    def train_batches(self, batch_size: int, epoch: int, limit: int | None = None, start: int = 0) -> Iterator[Batch]:
        steps = self.train_steps(batch_size)
        batches = range(start, steps if limit is None else min(limit, steps))
        return map(self._normalize, self.source.train(batch_size, self.seed, epoch, batches, self.shard))

    def val_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        count = -(-self.val_size // batch_size)
        batches = range(count if limit is None else min(limit, count))
        return map(self._normalize, self.source.val(batch_size, batches, self.shard))

    @cached_property
    def _bytes_normalized(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the scale of bytes (0..255), [1, C, 1, 1] each."""
        mean, std = (torch.tensor(values, device=self.device).mul_(255) for values in (self.mean, self.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _normalize(self, labelled: Labelled) -> Batch:
        images, labels = labelled
        images = to_device(images, self.device).float()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[-1] != self.image_size:
            smooth = {} if self.interpolation == "nearest" else {"align_corners": False}
            images = F.interpolate(images, size=self.image_size, mode=self.interpolation, **smooth).clamp_(0, 255)
        mean, std = self._bytes_normalized
        images = (images - mean).div_(std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(memory_format=layout)
        return Batch((images,), to_device(labels, self.device))


@dataclass
class MemorySource:
    """Images held in memory; each split is one large batch.

    Raises:
        ValueError: a split is empty, its images and labels differ in number, or the images are not squares of one size.
    """

    training: Labelled
    validation: Labelled
    augmentation: str = "none"
    notes: tuple[str, ...] = ()
    corrupt: set[str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for images, labels in (self.training, self.validation):
            if not len(images) == len(labels) > 0:
                raise ValueError(f"{len(images)} images and {len(labels)} labels: must be equally many, at least one")
        sizes = [tuple(images.shape[2:]) for images, _ in (self.training, self.validation)]
        if len({side for size in sizes for side in size}) > 1:
            raise ValueError(f"train has images of {sizes[0]} pixels, val of {sizes[1]}: must be squares of one size")
        self.train_size, self.val_size = len(self.training[1]), len(self.validation[1])

    def train(self, batch_size: int, seed: int, epoch: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        chance = epoch_seed(seed, epoch)
        order = shuffled(self.train_size, chance)
        for batch in batches:
            chosen = order[batch * batch_size : (batch + 1) * batch_size]
            images, labels = (t[chosen] for t in self.training)
            # The whole batch is augmented, so that an image's augmentation does not depend on the number of processes.
            images = augment(images, self.augmentation, torch.Generator().manual_seed(epoch_seed(chance, batch)))
            yield shard.samples(images), shard.samples(labels)

    def val(self, batch_size: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        images, labels = (torch.split(t, batch_size) for t in self.validation)
        return ((images[batch], labels[batch]) for batch in batches if shard.owns(batch))


def shrink(images: Tensor, size: int) -> Tensor:
    """Downsample images uint8 [N, C, H, H] to [N, C, size, size] by averaging; size must divide H."""
    factor = images.shape[2] // size
    if factor == 1:
        return images
    parts = [F.avg_pool2d(part.float(), factor).round_().to(torch.uint8) for part in images.split(4096)]
    return torch.cat(parts)


def augment(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Augment each image of a batch independently.

    Args:
        images: [N, C, H, W], any dtype.
        how: one of AUGMENTATIONS.
        generator: source of the random numbers.

    Returns:
        The same shape and dtype.
    """
    if how == "none":
        return images
    n, _, height, width = images.shape
    if how == "crop_flip":
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    margin = max(height // 8, 1)
    padded = F.pad(images, (margin,) * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    picked = padded[torch.arange(n).view(-1, 1, 1), :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return picked.permute(0, 3, 1, 2).contiguous()
