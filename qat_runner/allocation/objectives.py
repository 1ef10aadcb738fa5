"""What few bits are not to spoil: the distributions that a network's logits stand for, or a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Objective:
    """What is priced."""

    logits: Callable[[nn.Module, Any], Any]
    """a network, a batch -> what it answers"""
    loss: Callable[[Any, Any], tuple[Tensor, int]]
    """logits, a batch -> the mean loss, [], and of how many predictions it is the mean: what gradients are of"""
    rise: Callable[[Any, Any, Any], Tensor]
    """logits, those of full precision, a batch -> how much worse the former are, []"""


def of_distributions(logits: Callable[[nn.Module, Any], Tensor], dim: int = 1) -> Objective:
    """Of a network that should go on giving the same probabilities. Labels are not needed.

    The loss is the cross entropy of labels drawn from those probabilities themselves: the mean of its squared gradients
    is the Fisher information. (A trained network is so sure of the labels of its training data that their gradients
    tell little.) What quantized networks do worse is the Kullback-Leibler divergence, in nats.

    Args:
        logits: a network, a batch -> logits, C of them along `dim`.
        dim: of the classes.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def loss(found: Tensor, batch: Any) -> tuple[Tensor, int]:
        device = found.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        shares = found.detach().float().softmax(dim).movedim(dim, -1)
        labels = torch.multinomial(shares.flatten(0, -2), 1, generator=generator)[:, 0]
        return F.cross_entropy(found.float().movedim(dim, -1).flatten(0, -2), labels), len(labels)

    return Objective(logits, loss, lambda found, full, batch: divergence(found, full, 1.0, dim))


def of_loss(logits: Callable[[nn.Module, Any], Any], loss: Callable[[Any, Any], tuple[Tensor, int]]) -> Objective:
    """Of a network by any loss.

    Args:
        logits: a network, a batch -> what the loss takes.
        loss: that, the batch -> the mean loss, [], and of how many predictions it is the mean.
    """
    return Objective(logits, loss, lambda found, full, batch: loss(found, batch)[0] - loss(full, batch)[0])


def divergence(logits: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """Kullback-Leibler divergence of a teacher's distributions from others, softened (Hinton et al. 2015).

    Args:
        logits, teacher: of the same shape.
        temperature: what both are divided by; the result is multiplied with its square, so that gradients keep their
            size.
        dim: over which each distribution goes.

    Returns:
        Its mean over all distributions, in nats, float32 [].
    """
    wanted, found = (F.log_softmax(t.float() / temperature, dim=dim) for t in (teacher, logits))
    choices = logits.numel() // logits.shape[dim]
    return F.kl_div(found, wanted, reduction="sum", log_target=True) / choices * temperature**2
