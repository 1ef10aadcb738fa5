"""The interface that all data sets share: their batches."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat_runner.data.seeding import epoch_seed, shuffled


@dataclass(frozen=True)
class Shard:
    """The part of the data that one of several processes works on."""

    rank: int = 0
    world: int = 1

    def samples(self, batch: Any) -> Any:
        """Return this process's samples of a training batch (anything that can be sliced): every `world`-th."""
        return batch[self.rank :: self.world]

    def weight(self, batch: int) -> float:
        """Return the weight of this process's mean over its samples, where the means of all processes are averaged.

        The weight is 1 if all processes have the same number of samples of a training batch of `batch` samples.
        """
        return len(range(self.rank, batch, self.world)) * self.world / batch

    def owns(self, number: int) -> bool:
        """Return whether this process evaluates a validation batch.

        Validation batches are never split, because dynamic clipping scalars are solved on whole batches.
        """
        return number % self.world == self.rank


WHOLE = Shard()


class Batch(NamedTuple):
    """Inputs of a model, and the targets of its outputs."""

    inputs: tuple[Tensor, ...]
    """positional arguments of the model's forward method, [N, ...] each"""
    targets: Tensor
    """targets, [N, ...], in the format of the task"""

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return len(self.targets)

    def parts(self, count: int) -> Iterator["Batch"]:
        """Split the batch into `count` parts of about the same size, or fewer parts where there are fewer samples."""
        columns = [t.tensor_split(count) for t in (*self.inputs, self.targets)]
        for *inputs, targets in zip(*columns, strict=True):
            if len(targets):
                yield Batch(tuple(inputs), targets)


class Data(Protocol):
    """A data set ready for training. Its batches are on `device`, and both splits give the same batches on every call.

    Where several processes share the work, each gets its shard of every training batch, and a subset of the validation
    batches.
    """

    name: str
    device: torch.device
    seed: int
    shard: Shard

    @property
    def notes(self) -> tuple[str, ...]:
        """Findings from reading the data that the user should know about."""

    @property
    def corrupt(self) -> set[str] | None:
        """Samples left out so far because they could not be read; None where no sample may be left out."""

    @property
    def train_size(self) -> int: ...

    @property
    def val_size(self) -> int: ...

    def train_steps(self, batch_size: int) -> int:
        """Number of batches in an epoch, at least one."""

    def train_batches(self, batch_size: int, epoch: int, limit: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start` to `limit` of an epoch; every epoch has its own order and augmentation.

        Any range of batches of any epoch can be requested at any time.

        Args:
            batch_size: samples per batch, over all processes.
            epoch: number of the epoch, from 0.
            limit: the batch to stop before; None: the end of the epoch.
            start: number of batches to skip.
        """

    def val_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield the first `limit` batches of the validation split in its own order; the last batch may be smaller."""


def train_rows(data: Data, batch_size: int, epoch: int, limit: int | None, start: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of this process's samples for each training batch; arguments as in `Data.train_batches`."""
    order = shuffled(data.train_size, epoch_seed(data.seed, epoch)).numpy()
    for batch in itertools.islice(range(data.train_steps(batch_size)), start, limit):
        yield data.shard.samples(order[batch * batch_size : (batch + 1) * batch_size])


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of any shape and dtype to a device without blocking; copies from pageable memory could block."""
    if device.type == "cuda" and not (t.is_cuda or t.is_pinned()):
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def unsharded(data: Data) -> Data:
    """Return the same data without sharding, for work that every process must do on the same samples."""
    return replace(data, shard=WHOLE)  # type: ignore[type-var]  # all data sets are dataclasses with a shard
