"""Folders of pictures, a folder a class: decoded and augmented in worker processes."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qat_runner.data.batches import Shard
from qat_runner.data.images import Labelled, epoch_seed
from qat_runner.errors import RunError

RESIZE_RATIO = 256 / 224
"""Validation pictures are resized to this times the crop, the ImageNet standard."""


log = logging.getLogger("qat_runner")


class _Pictures(Dataset[tuple[Tensor, int, str]]):
    """Pictures of one half, asked for as (seed, index): augmentation depends on these two alone.

    An item is a picture, its label, and the path of a picture that cannot be decoded, or "".
    """

    def __init__(self, folder: Path, transform: Any, skip_corrupt: bool) -> None:
        self.files = ImageFolder(str(folder))
        self.transform = transform
        self.skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: Any) -> tuple[Tensor, int, str]:
        seed, index = item
        path, label = self.files.samples[index]
        try:
            picture = self.files.loader(path)
        except Exception as error:
            if self.skip_corrupt:
                return self.transform(Image.new("RGB", (8, 8))), label, path
            raise RunError(
                f"picture {path} cannot be decoded ({type(error).__name__}: {error}); "
                f"dataset.skip_corrupt=true leaves such pictures out"
            ) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(epoch_seed(seed, index))
            return self.transform(picture), label, ""


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
        skip_corrupt: leave out pictures that cannot be decoded.
    """

    def __init__(self, folder: Path, image_size: int, workers: int, skip_corrupt: bool = False) -> None:
        # antialias and bilinear are the defaults of the published recipes
        crop = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        center = v2.Compose([v2.Resize(round(image_size * RESIZE_RATIO)), v2.CenterCrop(image_size), v2.PILToTensor()])
        self._train = _Pictures(folder / "train", crop, skip_corrupt)
        self._val = _Pictures(folder / "val", center, skip_corrupt)
        self.corrupt: set[str] = set()
        """paths of the pictures that were left out"""
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

    def _batches(self, half: _Pictures, batches: list[list[tuple[int, int]]]) -> Iterator[Labelled]:
        loader: Any = DataLoader(
            half,
            batch_sampler=batches,
            num_workers=min(self._workers, _processors(), len(batches)),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else starting the workers would draw from the global one
        )
        try:
            for pictures, labels, paths in loader:
                yield self._decoded(pictures, labels, paths) if any(paths) else (pictures, labels)
        except RunError as error:  # from a worker it arrives with the worker's traceback as its message
            raise RunError(str(error).strip().splitlines()[-1].rpartition("RunError: ")[2]) from None

    def _decoded(self, pictures: Tensor, labels: Tensor, paths: Sequence[str]) -> Labelled:
        """What could be decoded of a batch."""
        good = [i for i, path in enumerate(paths) if not path]
        for path in sorted({*filter(None, paths)} - self.corrupt):
            log.warning(f"picture {path} cannot be decoded: left out")
        self.corrupt.update(filter(None, paths))
        if not good:
            raise RunError(f"none of the {len(paths)} pictures of a batch can be decoded, the first is {paths[0]}")
        return pictures[good], labels[good]
