"""Optimizer and learning rate of a recipe's stage."""

import math

import torch
from torch import nn

from qat_runner.config import StageConfig


def learning_rate(stage: StageConfig, base: float, epochs: int, epoch: int, step: int, steps: int) -> float:
    """The learning rate of one step: a function of where it is, so that nothing has to be remembered.

    Args:
        stage: schedule, decay and warm-up.
        base: learning rate before any decay.
        epochs: epochs in all.
        epoch: 0-based.
        step: 0-based within the epoch.
        steps: steps an epoch.
    """
    progress = epoch + step / steps  # in epochs
    if progress < stage.warmup_epochs:
        return base * (progress * steps + 1) / (stage.warmup_epochs * steps)
    if stage.schedule == "cosine":
        return (
            base
            * 0.5
            * (1 + math.cos(math.pi * (progress - stage.warmup_epochs) / max(epochs - stage.warmup_epochs, 1)))
        )
    return base * stage.decay_factor ** (epoch // stage.decay_every)


def make_optimizer(model: nn.Module, stage: StageConfig, lr: float) -> torch.optim.SGD:
    """SGD over all parameters, BatchNorm included, as the paper's recipes do."""
    return torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=stage.momentum,
        weight_decay=stage.weight_decay,
        nesterov=stage.nesterov and stage.momentum > 0,
    )
