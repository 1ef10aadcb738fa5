"""Augmentation of whole training batches of images: random erasing, mixup and cutmix, as implemented in torchvision.

Images are normalized before, as in the published recipes, so erased pixels become the mean. Random numbers depend only
on (seed, epoch, batch), and are drawn on the CPU, so nothing waits for the device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat_runner.config import StageConfig
from qat_runner.data.batches import Batch, Shard
from qat_runner.data.seeding import epoch_seed, seeded

MIXING = ("mixup", "cutmix", "random_erasing")
"""Keys of a recipe stage that enable it."""


class Mixing:
    """Maps a training batch of images and classes to partly erased, mixed images and soft targets.

    Each process mixes the images of its own part of a batch; all processes use the same mixing coefficients as long as
    their parts are equally long.

    Args:
        stage: a stage of the recipe; at least one of MIXING is above zero.
        num_classes: number of classes of the targets.
        seed: seed of the run.
        shard: shard of this process.
    """

    def __init__(self, stage: StageConfig, num_classes: int, seed: int, shard: Shard) -> None:
        from torchvision.transforms import v2  # deferred: the import takes a second

        self._seed, self._shard = seed, shard
        self._share = stage.random_erasing
        self._erasing = v2.RandomErasing()
        kinds = (v2.MixUp, stage.mixup), (v2.CutMix, stage.cutmix)
        self._mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]

    def __call__(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Erase and mix the batch of a step of an epoch.

        Args:
            batch: images [N, C, H, W], which are changed in place, and targets int64 [N].
            epoch: number of the epoch, from 0.
            step: number of the step in the epoch, from 0.

        Returns:
            The new batch. Where images are mixed, its targets are float32 [N, num_classes], the shares of the classes.
        """
        with seeded(epoch_seed(epoch_seed(epoch_seed(self._seed, epoch), step), 1)):
            (images,) = batch.inputs
            for i, (top, left, height, width) in self._erased(images):
                images[i, :, top : top + height, left : left + width] = 0
            return self._mixed(images, batch.targets)

    def _erased(self, images: Tensor) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Yield the image indices and the rectangles (top, left, height, width) to erase.

        They are drawn for the images of all processes, so they do not depend on the number of processes.
        """
        if self._share == 0:
            return
        own = self._shard.samples(range(len(images) * self._shard.world))
        places = {whole: i for i, whole in enumerate(own)}
        for whole, chosen in enumerate((torch.rand(len(images) * self._shard.world) < self._share).tolist()):
            if not chosen:
                continue
            found = self._erasing.make_params([images[0]])
            if found["v"] is not None and whole in places:
                yield places[whole], (found["i"], found["j"], found["h"], found["w"])

    def _mixed(self, images: Tensor, targets: Tensor) -> Batch:
        if not self._mixers:
            return Batch((images,), targets)
        which = int(torch.randint(len(self._mixers), ()))
        layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
        images, targets = self._mixers[which](images, targets)
        return Batch((images.contiguous(memory_format=layout or torch.contiguous_format),), targets)
