"""Clipping scalars of a batch that is distributed over several processes: sums over x become sums over all of them."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pool(Protocol):
    """Combines the statistics of several tensors, the parts, into those of all of them together."""

    def total(self, *figures: Tensor) -> list[Tensor]:
        """Return the sum of each figure over all parts, float64, in the same shapes."""

    def largest(self, figure: Tensor) -> Tensor:
        """Return the elementwise maximum over all parts."""


class Processes:
    """A `Pool` of the processes of torch.distributed's default group. All must make the same number of calls."""

    def total(self, *figures: Tensor) -> list[Tensor]:
        stacked = torch.stack([f.double() for f in figures])
        dist.all_reduce(stacked)
        return list(stacked)

    def largest(self, figure: Tensor) -> Tensor:
        figure = figure.clone()
        dist.all_reduce(figure, dist.ReduceOp.MAX)
        return figure
