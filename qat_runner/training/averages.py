"""A moving average of a network in training, often better than the network itself (Polyak and Juditsky 1992)."""

import copy

import torch
from torch import Tensor, nn


class Averages:
    """An exponential moving average of all parameters and buffers, including the clipping scalars of quantizers.

    As in TensorFlow, the decay after n steps is min(decay, (1 + n) / (10 + n)), so that early steps weigh more and the
    average of a short run does not stay at the initial values. No operation waits for the device.

    Args:
        model: the model to average.
        decay: the fraction of the average that is kept in each step, at least 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        """the averaged model"""
        self.decay = decay
        self.steps = 0
        """number of steps in the average"""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the current state of the model, after a training step, to the average."""
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 1.0
        self.steps += 1
        averaged, current = _tensors(self.model), _tensors(model)
        pairs = list(zip(averaged, current, strict=True))
        followed = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in followed], [b for _, b in followed], share)
        for a, b in pairs:
            if not a.is_floating_point():  # counters are copied
                a.copy_(b)

    @torch.no_grad()
    def resume(self, saved: dict[str, Tensor], steps: int) -> None:
        """Resume an average from a saved state, bit for bit.

        A quantizer that loads a state treats its running average of clipping scalars as finished and divides it by the
        fraction of steps that contributed to it. Because averaging continues here, the raw values must be restored.

        Args:
            saved: the state of the averaged model, which has already been loaded.
            steps: the number of steps in the average.
        """
        for name, t in self.model.state_dict().items():
            t.copy_(saved[name])
        self.steps = steps


def _tensors(model: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers())]
