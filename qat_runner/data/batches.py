"""What all data sets have in common: their batches, and the sums by which a pass over them is judged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The part of the data that one of several processes works on."""

    rank: int = 0
    world: int = 1

    def samples(self, batch: Any) -> Any:
        """Those of a training batch, of anything that can be sliced: every `world`-th."""
        return batch[self.rank :: self.world]

    def owns(self, number: int) -> bool:
        """Whether a validation batch is its own: whole ones, since they are what dynamic scalars are solved on."""
        return number % self.world == self.rank


WHOLE = Shard()


class Batch(NamedTuple):
    """What a model takes, and what it should answer."""

    inputs: tuple[Tensor, ...]
    """positional arguments of the model's forward, [N, ...] each"""
    targets: Tensor
    """class indices, int64: [N] for logits [N, C]; [N, d] for logits [N, C, d]"""

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


@dataclass
class Totals:
    """Sums over samples, kept on the device: adding a batch waits for nothing, reading does.

    A sample is a hit if each of its targets has the highest logit (or one of the five highest).
    """

    sums: Tensor  # float64 [4]: loss, hits, hits among five, samples
    names: tuple[str, str] = ("top1", "top5")

    @classmethod
    def on(cls, device: torch.device, names: tuple[str, str] = ("top1", "top5")) -> "Totals":
        return cls(torch.zeros(4, dtype=torch.float64, device=device), names)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """loss: mean over the batch, []; logits [N, C] or [N, C, d]; targets [N] or [N, d]."""
        n = len(targets)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        best, any_of_five = hits[:, 0].reshape(n, -1).all(1).sum(), hits.any(1).reshape(n, -1).all(1).sum()
        self.sums += torch.stack([loss.detach().float() * n, best, any_of_five, torch.full_like(loss, n).float()])

    def merge(self, gather: Callable[[Any], list[Any]], add_up: Callable[[Tensor], Tensor]) -> None:
        """Become the totals of all processes that share a pass; the two tell them each other's figures."""
        add_up(self.sums)

    def read(self) -> dict[str, float]:
        """Mean loss, both hit rates by their names (percent), samples."""
        loss, best, five, n = self.sums.tolist()
        rates = {name: 100 * hits / max(n, 1) for name, hits in zip(self.names, (best, five), strict=True)}
        return {"loss": loss / max(n, 1), **rates, "samples": n}


class Data(Protocol):
    """A data set ready for training. Its batches are on `device`; both halves come out the same at any time.

    Where several processes share the work, each gets its shard of every training batch, and its share of the validation
    batches.
    """

    name: str
    device: torch.device
    metric: str
    """the figure of a validation pass that counts, in percent"""
    unit: str
    """what a sample is, in a word"""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found in reading the data that whoever asked for them should know."""

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
        """The first `limit` batches of the validation half in its own order, the last as small as it comes."""

    def totals(self) -> Totals:
        """Sums for a pass over training batches."""

    def score(self) -> Totals:
        """Sums for a pass over all of `val_batches`; reading them gives `metric`."""


def undivided(data: Data) -> Data:
    """The same data as one process alone would see it, for what every process must do on the same samples."""
    return replace(data, shard=WHOLE)  # type: ignore[type-var]  # all data sets are dataclasses with a shard
