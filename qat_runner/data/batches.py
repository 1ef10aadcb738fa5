"""What all data sets have in common: their batches."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat_runner.data.chance import epoch_seed, shuffled


@dataclass(frozen=True)
class Shard:
    """The part of the data that one of several processes works on."""

    rank: int = 0
    world: int = 1

    def samples(self, batch: Any) -> Any:
        """Those of a training batch, of anything that can be sliced: every `world`-th."""
        return batch[self.rank :: self.world]

    def weight(self, batch: int) -> float:
        """Of the mean over its samples of a training batch, where the means of all processes are averaged.

        1 if each has as many samples.
        """
        return len(range(self.rank, batch, self.world)) * self.world / batch

    def owns(self, number: int) -> bool:
        """Whether a validation batch is its own: whole ones, since they are what dynamic scalars are solved on."""
        return number % self.world == self.rank


WHOLE = Shard()


class Batch(NamedTuple):
    """What a model takes, and what it should answer."""

    inputs: tuple[Tensor, ...]
    """positional arguments of the model's forward, [N, ...] each"""
    targets: Tensor
    """what it should answer, [N, ...], in the terms of the task"""

    @property
    def size(self) -> int:
        """N, the number of samples."""
        return len(self.targets)

    def parts(self, count: int) -> Iterator["Batch"]:
        """The batch in `count` parts of about the same size, fewer where there are fewer samples."""
        columns = [t.tensor_split(count) for t in (*self.inputs, self.targets)]
        for *inputs, targets in zip(*columns, strict=True):
            if len(targets):
                yield Batch(tuple(inputs), targets)


class Data(Protocol):
    """A data set ready for training. Its batches are on `device`; both splits come out the same at any time.

    Where several processes share the work, each gets its shard of every training batch, and its share of the validation
    batches.
    """

    name: str
    device: torch.device
    seed: int
    shard: Shard

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found in reading the data that whoever asked for them should know."""

    @property
    def corrupt(self) -> set[str] | None:
        """What could not be read and was left out up to now; None where nothing may be left out."""

    @property
    def train_size(self) -> int: ...

    @property
    def val_size(self) -> int: ...

    def train_steps(self, batch_size: int) -> int:
        """Batches in an epoch; at least one."""

    def train_batches(self, batch_size: int, epoch: int, limit: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Batches `start` to `limit` of an epoch, in its own order and augmentation; any of them at any time.

        Args:
            batch_size: samples a batch, over all processes.
            epoch: 0 or more.
            limit: where to end; None: with the epoch.
            start: how many to skip.
        """

    def val_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The first `limit` batches of the validation split in its own order, the last as small as it comes."""


def train_rows(data: Data, batch_size: int, epoch: int, limit: int | None, start: int) -> Iterator[NDArray[np.int64]]:
    """Of each training batch that `Data.train_batches` is asked for, the numbers of this process's samples."""
    order = shuffled(data.train_size, epoch_seed(data.seed, epoch)).numpy()
    for batch in itertools.islice(range(data.train_steps(batch_size)), start, limit):
        yield data.shard.samples(order[batch * batch_size : (batch + 1) * batch_size])


def sent(t: Tensor, device: torch.device) -> Tensor:
    """A tensor, of any shape and dtype, on its way to a device without a wait, as from pageable memory there may be."""
    if device.type == "cuda" and not (t.is_cuda or t.is_pinned()):
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def unsharded(data: Data) -> Data:
    """The same data as one process alone would see it, for what every process must do on the same samples."""
    return replace(data, shard=WHOLE)  # type: ignore[type-var]  # all data sets are dataclasses with a shard
