"""Oscillation dampening: a loss term that pulls weights to the centers of their quantization intervals, their levels.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 4.2:

    L = L_task + lambda sum (Q(w) - clip(w, lowest level, highest level))^2

over all elements of all weights. Q(w) and the clipping scalars are treated as constants, so the gradient of the term is
2 lambda (clip(w) - Q(w)) for w between the lowest and the highest level, and 0 for clipped elements, where clip(w) and
Q(w) are equal. Clipping scalars, solved or learned, receive no gradient from it. Lambda increases from 0 along half a
cosine, so that weights can move freely at first.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qat_runner.config import Config
from qat_runner.training.latent import LatentWeight, latent_weights
from qat_runner.training.oscillations import half_cosine


class Dampening:
    """Adds the gradient of the term. No operation waits for the device.

    Args:
        weights: the weights to dampen.
        final: lambda at the end of training.
    """

    def __init__(self, weights: Sequence[LatentWeight], final: float) -> None:
        self.weights, self.final = weights, final

    @torch.no_grad()
    def add_gradients(self, progress: float) -> None:
        """Add the gradient of the term to those of the weights; weights without a gradient are skipped.

        Call it once per step, after the backward passes and before the optimizer updates the weights.

        Args:
            progress: position in training, at least 0 and below 1.
        """
        strength = half_cosine(0.0, self.final, progress)
        for weight in self.weights:
            if weight.x.grad is not None:
                low, high = weight.bounds
                distance = weight.x.clamp(low, high) - weight.quantized()
                weight.x.grad.add_(distance.to(weight.x.grad.dtype), alpha=2 * strength)


def dampening_of(config: Config, model: nn.Module) -> Dampening | None:
    """Create the `Dampening` that a resolved config asks for, or return None if it asks for none."""
    final = config.oscillations.dampening
    return Dampening(latent_weights(model), final) if config.quantized_training and final else None
