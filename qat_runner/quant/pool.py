"""Clipping scalars of a batch that is spread over several processes: sums over x become sums over all of them."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pool(Protocol):
    """How figures of several tensors become those of all of them together."""

    def total(self, *figures: Tensor) -> list[Tensor]:
        """The sum of each, float64, shapes kept."""

    def largest(self, figure: Tensor) -> Tensor:
        """The elementwise maximum."""


class Processes:
    """A `Pool` of the processes of torch.distributed's default group. Each must call it equally often."""

    def total(self, *figures: Tensor) -> list[Tensor]:
        stacked = torch.stack([f.double() for f in figures])
        dist.all_reduce(stacked)
        return list(stacked)

    def largest(self, figure: Tensor) -> Tensor:
        figure = figure.clone()
        dist.all_reduce(figure, dist.ReduceOp.MAX)
        return figure
