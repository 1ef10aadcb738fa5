"""Folders of pictures, a folder a class: decoded and augmented in worker processes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qat_runner.data.batches import Shard
from qat_runner.data.images import Labelled, epoch_seed
from qat_runner.errors import RunError

RESIZE_RATIO = 256 / 224
"""Validation pictures are resized to this times the crop, the ImageNet standard."""


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures of one half, asked for as (seed, index): augmentation depends on these two alone."""

    def __init__(self, folder: Path, transform: Any) -> None:
        self.files = ImageFolder(str(folder))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: Any) -> tuple[Tensor, int]:
        seed, index = item
        path, label = self.files.samples[index]
        try:
            picture = self.files.loader(path)
        except Exception as error:
            raise RunError(f"picture {path} cannot be decoded ({type(error).__name__}: {error})") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(epoch_seed(seed, index))
            return self.transform(picture), label


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
        workers: processes that decode, for each half; 0 decodes in this process.
    """

    def __init__(self, folder: Path, image_size: int, workers: int) -> None:
        # antialias and bilinear are the defaults of the published recipes
        crop = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        center = v2.Compose([v2.Resize(round(image_size * RESIZE_RATIO)), v2.CenterCrop(image_size), v2.PILToTensor()])
        self._train = _Pictures(folder / "train", crop)
        self._val = _Pictures(folder / "val", center)
        self._workers = workers
        self.classes = self._train.files.classes
        if self._val.files.classes != self.classes:
            odd = sorted(set(self.classes) ^ set(self._val.files.classes))
            raise ValueError(f"train/ and val/ differ in their class folders: {', '.join(odd[:5])}")
        self.train_size, self.val_size = len(self._train), len(self._val)

    def train(self, batch_size: int, seed: int, epoch: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        chance = epoch_seed(seed, epoch)
        order = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(chance)).tolist()
        whole = (order[batch * batch_size : (batch + 1) * batch_size] for batch in batches)
        return self._batches(self._train, [[(chance, index) for index in shard.samples(part)] for part in whole])

    def val(self, batch_size: int, batches: range, shard: Shard) -> Iterator[Labelled]:
        order = range(self.val_size)
        own = (order[batch * batch_size : (batch + 1) * batch_size] for batch in batches if shard.owns(batch))
        return self._batches(self._val, [[(0, index) for index in part] for part in own])

    def _batches(self, pictures: _Pictures, batches: list[list[tuple[int, int]]]) -> Iterator[Labelled]:
        loader = DataLoader(
            pictures,
            batch_sampler=batches,
            num_workers=min(self._workers, _processors(), len(batches)),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else starting the workers would draw from the global one
        )
        try:
            yield from loader
        except RunError as error:  # from a worker it arrives with the worker's traceback as its message
            raise RunError(str(error).strip().splitlines()[-1].rpartition("RunError: ")[2]) from None
