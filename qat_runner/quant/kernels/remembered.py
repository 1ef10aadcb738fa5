"""The clipping scalars that a quantizer remembers from its calls; kernels update them in place, without host waits."""

from typing import NamedTuple

import torch
from torch import Tensor


class Remembered(NamedTuple):
    """The state of a quantizer (`state.ScalarState`); all tensors are on the device of x."""

    s: Tensor
    """magnitudes of the scalars of the latest call; [], or one per row with as many dimensions as x; float32"""
    running_s: Tensor
    """their exponential moving average; shape and dtype of s"""
    batches: Tensor
    """number of calls that the scalars were computed from; int64, []"""
    momentum: float
    """weight of the newest scalars in the average"""
    known: bool
    """whether there are scalars yet; if not, the next ones initialize the average"""

    @property
    def weight(self) -> float:
        """The weight of the next scalars in the average: 1 if they are the first."""
        return self.momentum if self.known else 1.0

    def holds(self, device: torch.device) -> bool:
        """Whether a device's kernels can write to this state; not in another dtype, such as in a float64 network."""
        scalars = self.s.dtype is self.running_s.dtype is torch.float32 and self.batches.dtype is torch.int64
        dense = self.s.is_contiguous() and self.running_s.is_contiguous() and self.s.numel() > 0
        return scalars and dense and self.s.device == self.running_s.device == self.batches.device == device

    def written(self) -> None:
        """Increment the version counters, so that autograd and other readers know that a kernel wrote to the state."""
        torch.autograd.graph.increment_version([t for t in self[:3] if not t.is_inference()])


def remember(s: Tensor, state: Remembered) -> None:
    """Store the scalars of a call and include them in the average; the reference for the kernels.

    A batch with NaN or infinity ends a run, but must not corrupt the average for a later continuation: where s is not
    finite, the previous scalar is kept. (Before the first batch there is none; if that batch is not finite, it counts
    as 0.)

    Args:
        s: magnitudes, shape of `state.s`.
        state: updated in place.
    """
    s = s.to(state.s.dtype)
    s = torch.where(torch.isfinite(s), s, state.s)
    state.s.copy_(s)
    state.running_s.lerp_(s, state.weight)
    state.batches.add_(1)
