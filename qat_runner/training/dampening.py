"""Oscillation dampening: a term of the loss that pulls weights towards the middle of their intervals, to their codes.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 4.2:

    L = L_task + lambda sum (Q(w) - clip(w, lowest level, highest level))^2

over all elements of all weights. Q(w) and the scalars are constants, so its gradient is 2 lambda (clip(w) - Q(w)) for w
within the levels, and 0 for what is clipped, where both are the same. Scalars, solved or learned, get none. Lambda
rises from 0 by half a cosine: at first weights go where they want to.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qat_runner.config import Config
from qat_runner.training.latent import LatentWeight, latent_weights
from qat_runner.training.oscillations import half_cosine


class Dampening:
    """Adds the gradient of the term; nothing waits for the device.

    Args:
        weights: that are dampened.
        final: lambda at the end of training.
    """

    def __init__(self, weights: Sequence[LatentWeight], final: float) -> None:
        self.weights, self.final = weights, final

    @torch.no_grad()
    def add_gradients(self, progress: float) -> None:
        """Once a step, after its backward passes and before the weights move; weights without a gradient get none.

        Args:
            progress: of training, 0 to below 1.
        """
        strength = half_cosine(0.0, self.final, progress)
        for weight in self.weights:
            if weight.x.grad is not None:
                low, high = weight.ends
                distance = weight.x.clamp(low, high) - weight.quantized()
                weight.x.grad.add_(distance.to(weight.x.grad.dtype), alpha=2 * strength)


def dampening_of(config: Config, model: nn.Module) -> Dampening | None:
    """What a resolved config asks for, of the weights of its model."""
    final = config.oscillations.dampening
    return Dampening(latent_weights(model), final) if config.quantized_training and final else None
