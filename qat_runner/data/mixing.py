"""What is done to training batches of pictures as a whole: random erasing, mixup and cutmix, as torchvision has them.

Pictures are normalized before, as in the published recipes, so that what is erased becomes the mean. Chance depends on
(seed, epoch, batch) alone, and is drawn on the CPU: nothing waits for the device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat_runner.config import StageConfig
from qat_runner.data.batches import Batch, Shard
from qat_runner.data.chance import drawing, epoch_seed

MIXING = ("mixup", "cutmix", "random_erasing")
"""Keys of a stage that ask for it."""


class Mixing:
    """A training batch of pictures and classes -> pictures erased in part and mixed with one another, and soft targets.

    Each process mixes the pictures of its own part of a batch; all of them in the same shares.

    Args:
        stage: of the recipe; at least one of MIXING is above zero.
        num_classes: of the targets.
        seed: of the run.
        shard: of this process.
    """

    def __init__(self, stage: StageConfig, num_classes: int, seed: int, shard: Shard) -> None:
        from torchvision.transforms import v2  # which takes a second to import

        self._seed, self._shard = seed, shard
        self._share = stage.random_erasing
        self._erasing = v2.RandomErasing()
        kinds = (v2.MixUp, stage.mixup), (v2.CutMix, stage.cutmix)
        self._mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]

    def __call__(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Of step `step` of an epoch, both from 0; pictures [N, C, H, W] are changed in place, targets int64 [N].

        Returns:
            Targets are float32 [N, num_classes], shares of classes, where pictures are mixed.
        """
        with drawing(epoch_seed(epoch_seed(epoch_seed(self._seed, epoch), step), 1)):
            (pictures,) = batch.inputs
            for i, (top, left, height, width) in self._erased(pictures):
                pictures[i, :, top : top + height, left : left + width] = 0
            return self._mixed(pictures, batch.targets)

    def _erased(self, pictures: Tensor) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Which pictures lose what: drawn for those of all processes, so that it does not depend on their number."""
        if self._share == 0:
            return
        own = self._shard.samples(range(len(pictures) * self._shard.world))
        places = {whole: i for i, whole in enumerate(own)}
        for whole, chosen in enumerate((torch.rand(len(pictures) * self._shard.world) < self._share).tolist()):
            if not chosen:
                continue
            found = self._erasing.make_params([pictures[0]])
            if found["v"] is not None and whole in places:
                yield places[whole], (found["i"], found["j"], found["h"], found["w"])

    def _mixed(self, pictures: Tensor, targets: Tensor) -> Batch:
        if not self._mixers:
            return Batch((pictures,), targets)
        which = int(torch.randint(len(self._mixers), ()))
        layout = torch.channels_last if pictures.is_contiguous(memory_format=torch.channels_last) else None
        pictures, targets = self._mixers[which](pictures, targets)
        return Batch((pictures.contiguous(memory_format=layout or torch.contiguous_format),), targets)
