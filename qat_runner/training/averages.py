"""A moving average of a network in training, often better than the network (Polyak and Juditsky 1992)."""

import copy

import torch
from torch import Tensor, nn


class Averages:
    """An exponential moving average of all parameters and buffers, scalars of quantizers among them.

    The first steps weigh more, min(decay, (1 + n) / (10 + n)) after n steps, as TensorFlow's has it, so that short runs
    do not end where they began. Nothing waits for the device.

    Args:
        model: that is to be followed.
        decay: what remains of the average in a step, 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        """the average"""
        self.decay = decay
        self.steps = 0
        """that it is made of"""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take a step of the model in."""
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 1.0
        self.steps += 1
        averaged, current = _tensors(self.model), _tensors(model)
        pairs = list(zip(averaged, current, strict=True))
        followed = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in followed], [b for _, b in followed], share)
        for a, b in pairs:
            if not a.is_floating_point():  # counts
                a.copy_(b)

    @torch.no_grad()
    def go_on(self, saved: dict[str, Tensor], steps: int) -> None:
        """Take an average up where it was, to the last bit.

        Quantizers that are loaded take the average of their scalars for finished, and divide it by the share of the
        steps that had some. Here it goes on, so that it must stay as it is until someone asks for it.

        Args:
            saved: the model's state, which has been loaded.
            steps: that it is made of.
        """
        for name, t in self.model.state_dict().items():
            t.copy_(saved[name])
        self.steps = steps


def _tensors(model: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers())]
