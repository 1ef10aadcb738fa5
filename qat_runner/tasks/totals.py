"""The sums by which a pass over data is judged.

torchmetrics has top-k accuracy, too, but not of samples with several targets, which are right if all are (the ends of
an answer); it waits for the device to look at its inputs, unless told not to; and its F1 of SQuAD follows the rule of
v2. What is left is a `topk` and a sum.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from qat_runner import distributed

Hits = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Logits [N, ...] and targets [N, ...] -> how many of N samples are right, [] each, by one measure or several."""


@dataclass
class Totals:
    """Sums over samples, kept on the device: adding a batch waits for nothing, reading does.

    A checkpoint holds `sums`, so that an epoch can be gone on with.
    """

    device: torch.device
    names: tuple[str, ...]
    """of the measures of `hits`; the first is shown while a pass is under way"""
    hits: Hits
    sums: Tensor = field(init=False)
    """float64 [2 + names]: loss, hits by each measure, samples"""
    predictions: dict[str, str] | None = field(default=None, init=False)
    """once read: the answer to each sample that has a name, where answers are of use by themselves"""

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2 + len(self.names), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """loss: mean over the batch, []; logits [N, ...] and targets [N, ...] as `hits` takes them."""
        n = len(targets)
        losses, *counts, samples = self.sums  # views: a stack of the parts, of several dtypes, would copy each first
        losses += loss.detach().float() * n
        for count, hits in zip(counts, self.hits(logits, targets), strict=True):
            count += hits
        samples += n

    def merged(self) -> Self:
        """The totals of all processes that share a pass, known to all of them."""
        everyone = copy.copy(self)
        everyone.sums = distributed.all_reduce(self.sums.clone())
        return everyone

    def read(self) -> dict[str, float]:
        """The figures, all samples that were added among them."""
        return self.figures(self.sums.tolist())

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean loss, the hit rates by their names (percent), samples: from sums as of some time."""
        loss, *hits, n = sums
        rates = {name: 100 * count / max(n, 1) for name, count in zip(self.names, hits, strict=True)}
        return {"loss": loss / max(n, 1), **rates, "samples": n}


def top_five(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Samples each of whose targets has the highest logit; and one of the five highest.

    Args:
        logits: [N, C] or [N, C, d].
        targets: int64, [N] or [N, d]; or shares of classes, float [N, C], of which the largest counts.

    Returns:
        Two counts, int64 [].
    """
    if targets.is_floating_point():
        targets = targets.argmax(1)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    if hits.ndim == 2:  # no more than one hit a sample
        return hits[:, 0].sum(), hits.sum()
    return hits[:, 0].all(1).sum(), hits.any(1).all(1).sum()
