"""Sums over a pass over data, from which its loss and metrics are computed.

torchmetrics also has top-k accuracy, but not for samples with several targets that must all be right (start and end of
an answer). By default it synchronizes with the device to check its inputs, and its F1 of SQuAD follows the rule of v2.
What remains is a `topk` and a sum, which are implemented here.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from qat_runner import distributed

Hits = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Maps logits [N, ...] and targets [N, ...] to the number of right samples, [] each, by one or several metrics."""


@dataclass
class Totals:
    """Sums over samples, kept on the device. Adding a batch does not synchronize with the device; reading does.

    Checkpoints contain `sums`, so that an interrupted epoch can be resumed.
    """

    device: torch.device
    names: tuple[str, ...]
    """names of the metrics of `hits`; the first is shown while a pass is running"""
    hits: Hits
    sums: Tensor = field(init=False)
    """float64 [2 + len(names)]: loss, hits by each metric, samples"""
    predictions: dict[str, str] | None = field(default=None, init=False)
    """after `read`: the predicted answer of each sample by its id, for tasks whose answers are useful by themselves"""

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2 + len(self.names), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean over the batch, [].
            logits: [N, ...], as `hits` takes them.
            targets: [N, ...], as `hits` takes them.
        """
        n = len(targets)
        losses, *counts, samples = self.sums  # views: stacking the parts, which differ in dtype, would copy each first
        losses += loss.detach().float() * n
        for count, hits in zip(counts, self.hits(logits, targets), strict=True):
            count += hits
        samples += n

    def merged(self) -> Self:
        """Return the totals over all processes that share a pass; every process gets them."""
        everyone = copy.copy(self)
        everyone.sums = distributed.all_reduce(self.sums.clone())
        return everyone

    def read(self) -> dict[str, float]:
        """Return the figures of all samples added so far."""
        return self.figures(self.sums.tolist())

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Compute the mean loss, the hit rates in percent by name, and the number of samples from sums."""
        loss, *hits, n = sums
        rates = {name: 100 * count / max(n, 1) for name, count in zip(self.names, hits, strict=True)}
        return {"loss": loss / max(n, 1), **rates, "samples": n}


def top_five(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Count the samples whose targets all have the highest logit, and those whose targets are all in the top five.

    Args:
        logits: [N, C] or [N, C, d].
        targets: int64, [N] or [N, d]; or class probabilities, float [N, C], of which the largest counts.

    Returns:
        Two counts, int64 [].
    """
    if targets.is_floating_point():
        targets = targets.argmax(1)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    if hits.ndim == 2:  # at most one hit per sample
        return hits[:, 0].sum(), hits.sum()
    return hits[:, 0].all(1).sum(), hits.any(1).all(1).sum()
