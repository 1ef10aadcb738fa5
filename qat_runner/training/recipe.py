"""Optimizer and learning rate of a recipe's stage."""

import math
from typing import Any

import torch
from torch import nn

from qat_runner.config import StageConfig
from qat_runner.insertion import quantized_tensors
from qat_runner.quant import LearnedQuantizer


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
    """SGD over all parameters, BatchNorm included, as the paper's recipes do.

    Learned clipping scalars bring the rules for weight decay that they were published with (see `quant.learned`).
    """
    decay: dict[nn.Parameter, float] = dict.fromkeys(model.parameters(), stage.weight_decay)
    for tensor in quantized_tensors(model):
        if isinstance(tensor.quantizer, LearnedQuantizer):
            if not tensor.quantizer.decays:
                decay[tensor.quantizer.learned] = 0.0
            if tensor.tensor == "weight":
                weight = model.get_parameter(f"{tensor.layer}.weight")
                decay[weight] = stage.weight_decay * tensor.quantizer.weight_decay_factor
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decay if decay[p] == value], "weight_decay": value}
        for value in sorted({*decay.values()}, reverse=True)
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=stage.momentum, nesterov=stage.nesterov and stage.momentum > 0)
