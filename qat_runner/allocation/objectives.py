"""What quantization is to preserve: the distributions that a network's logits represent, or a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Objective:
    """What prices are computed from."""

    logits: Callable[[nn.Module, Any], Any]
    """(network, batch) -> the output of the network"""
    loss: Callable[[Any, Any], tuple[Tensor, int]]
    """(logits, batch) -> the mean loss, [], whose gradients are used, and the number of predictions in that mean"""
    rise: Callable[[Any, Any, Any], Tensor]
    """(logits, logits in full precision, batch) -> how much worse the former are, []"""


def distribution_objective(logits: Callable[[nn.Module, Any], Tensor], dim: int = 1) -> Objective:
    """Return an objective for a network that should keep predicting the same probabilities. It needs no labels.

    The loss is the cross entropy with labels drawn from these probabilities themselves: the mean of its squared
    gradients is the Fisher information. (A trained network is so sure of the labels of its training data that the
    gradients for them say little.) How much worse a quantized network is, is the Kullback-Leibler divergence, in nats.

    Args:
        logits: (network, batch) -> logits, C of them along `dim`.
        dim: the dimension of the classes.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def loss(found: Tensor, batch: Any) -> tuple[Tensor, int]:
        device = found.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        shares = found.detach().float().softmax(dim).movedim(dim, -1)
        labels = torch.multinomial(shares.flatten(0, -2), 1, generator=generator)[:, 0]
        return F.cross_entropy(found.float().movedim(dim, -1).flatten(0, -2), labels), len(labels)

    return Objective(logits, loss, lambda found, full, batch: divergence(found, full, 1.0, dim))


def loss_objective(
    logits: Callable[[nn.Module, Any], Any], loss: Callable[[Any, Any], tuple[Tensor, int]]
) -> Objective:
    """Return an objective for a network that is judged by any loss.

    Args:
        logits: (network, batch) -> what the loss takes.
        loss: (the result of `logits`, batch) -> the mean loss, [], and the number of predictions in that mean.
    """
    return Objective(logits, loss, lambda found, full, batch: loss(found, batch)[0] - loss(full, batch)[0])


def divergence(logits: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """Return the Kullback-Leibler divergence of a teacher's distributions from others, softened (Hinton et al. 2015).

    Args:
        logits, teacher: two tensors of the same shape.
        temperature: both are divided by it; the result is multiplied by its square, so that gradients keep their size.
        dim: the dimension of the classes.

    Returns:
        The mean over all distributions, in nats, float32 [].
    """
    wanted, found = (F.log_softmax(t.float() / temperature, dim=dim) for t in (teacher, logits))
    choices = logits.numel() // logits.shape[dim]
    return F.kl_div(found, wanted, reduction="sum", log_target=True) / choices * temperature**2
