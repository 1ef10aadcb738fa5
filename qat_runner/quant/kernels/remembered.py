"""What a quantizer remembers of the scalars of its calls, as kernels write to it: in place, and without a wait."""

from typing import NamedTuple

import torch
from torch import Tensor


class Remembered(NamedTuple):
    """The state of a quantizer (`state.ScalarState`), all of it on the device of x."""

    s: Tensor
    """scalars of the latest call, magnitudes; [] or one a row with all dimensions of x, float32"""
    running_s: Tensor
    """their exponential average; as s"""
    batches: Tensor
    """how many calls they stem from; int64, []"""
    momentum: float
    """weight of the newest in the average"""
    known: bool
    """whether there are scalars; otherwise the next ones begin the average"""

    @property
    def weight(self) -> float:
        """Of the next scalars in the average: all of it, if they are the first."""
        return self.momentum if self.known else 1.0

    def holds(self, device: torch.device) -> bool:
        """Whether kernels of a device can write to it: another dtype, such as of a network in float64, they cannot."""
        scalars = self.s.dtype is self.running_s.dtype is torch.float32 and self.batches.dtype is torch.int64
        dense = self.s.is_contiguous() and self.running_s.is_contiguous() and self.s.numel() > 0
        return scalars and dense and self.s.device == self.running_s.device == self.batches.device == device

    def written(self) -> None:
        """Tell autograd, and whoever asks for versions, that a kernel wrote to it."""
        torch.autograd.graph.increment_version([t for t in self[:3] if not t.is_inference()])


def remember(s: Tensor, state: Remembered) -> None:
    """Take the scalars of a call over, and into the average; the reference of what kernels do.

    A batch that is not finite ends a run, but must not spoil the average for whoever goes on from it: where s is not
    finite, what was there stays. (Before the first batch there is nothing: a first one that is not finite counts as 0.)

    Args:
        s: magnitudes, shape of `state.s`.
        state: written to.
    """
    s = s.to(state.s.dtype)
    s = torch.where(torch.isfinite(s), s, state.s)
    state.s.copy_(s)
    state.running_s.lerp_(s, state.weight)
    state.batches.add_(1)
