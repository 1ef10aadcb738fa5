"""Optimizer and learning rate of a recipe's stage."""

import math
from typing import Any

import torch
from torch import nn

from qat_runner.config import Optimizer, Schedule, Spared, StageConfig
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.layers import QuantLayer
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
        return base * min((progress * steps + 1) / (stage.warmup_epochs * steps), 1.0)
    done = (progress - stage.warmup_epochs) / max(epochs - stage.warmup_epochs, 1 / steps)  # 0 to 1
    if stage.schedule == Schedule.cosine:
        return base * 0.5 * (1 + math.cos(math.pi * done))
    if stage.schedule == Schedule.linear:
        return base * (1 - done)
    return base * stage.decay_factor ** (epoch // stage.decay_every)


def make_optimizer(model: nn.Module, stage: StageConfig, lr: float) -> torch.optim.Optimizer:
    """SGD with weight decay of all parameters, BatchNorm included, as the paper's recipes do; or AdamW, which spares
    some of them (`spared`), and with or without bias correction.

    On a GPU it is PyTorch's fused one: a launch or two for all parameters, and under fp16 it skips a step that
    overflowed without the GradScaler having to ask the device. On a CPU it rounds otherwise, and gains little.

    Learned clipping scalars bring the rules for weight decay that they were published with (see `quant.learned`).
    """
    fused = fuses(next(model.parameters()).device)
    adamw = stage.optimizer == Optimizer.adamw
    free = spared(model, stage.spared) if adamw else set()
    decay = {p: 0.0 if p in free else stage.weight_decay for p in model.parameters()}
    for tensor in quantized_tensors(model):
        if isinstance(tensor.quantizer, LearnedQuantizer):
            method = tensor.quantizer.method
            decay[tensor.quantizer.learned] = stage.weight_decay if method.decays else 0.0
            if tensor.tensor == "weight":
                layer = model.get_submodule(tensor.layer)
                assert isinstance(layer, QuantLayer)
                factor = method.weight_decay_factor(tensor.quantizer.format)
                decay[layer.qat_stored_weight()] = stage.weight_decay * factor
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decay if decay[p] == value], "weight_decay": value}
        for value in sorted({*decay.values()}, reverse=True)
    ]
    if adamw:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused)
        if not stage.bias_correction:
            _start_far_along(optimizer)
        return optimizer
    nesterov = stage.nesterov and stage.momentum > 0
    sgd = torch.optim.SGD(groups, lr=lr, momentum=stage.momentum, nesterov=nesterov, fused=fused)
    if fused and stage.momentum > 0:
        _start_from_zero(sgd)
    return sgd


def spared(model: nn.Module, which: Spared) -> set[nn.Parameter]:
    """The parameters of a network that AdamW does not decay.

    Args:
        model: any.
        which: vectors: those of one dimension, as BERT is fine-tuned. tokens: those of vision transformers as well, by
            what timm's networks say themselves (`no_weight_decay`), and by the names and shapes that others have.
    """
    found = {p for p in model.parameters() if p.ndim < 2}
    if which == Spared.tokens:
        listed = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in model.named_modules()
            if callable(says := getattr(module, "no_weight_decay", None))
            for name in says()
        }
        for name, p in model.named_parameters():
            of_a_layer = p.ndim > 2 and p.numel() == max(p.shape)  # a scale, [C, 1, 1]
            if name in listed or of_a_layer or name.rpartition(".")[2] in _POSITIONS:
                found.add(p)
    return found


_POSITIONS = (
    *("pos_embed", "pos_embedding", "position_embeddings", "relative_position_bias_table"),
    *("cls_token", "class_token", "dist_token", "distillation_token"),
)
"""What parameters of positions and tokens are called in timm, torchvision and transformers."""


def fuses(device: torch.device) -> bool | None:
    """Whether parameters on a device are updated by a fused optimizer; None: PyTorch chooses among the others."""
    return True if device.type == "cuda" else None


def _start_from_zero(optimizer: torch.optim.SGD) -> None:
    """Have averages of gradients, where PyTorch's fused SGD would make them of its first gradients.

    It would in memory that it does not fill when that step overflowed under fp16 and is skipped, and would go on from
    whatever lies there. Other SGDs are not called then.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


FAR_ALONG = 100_000.0
"""A count of steps at which Adam's bias corrections, 1 - 0.9^t and 1 - 0.999^t, are 1 to the last bit of a double."""


def _start_far_along(optimizer: torch.optim.AdamW) -> None:
    """Leave out bias correction, for which PyTorch's AdamW has no switch: its averages start at zero all the same, but
    its count of steps at FAR_ALONG.

    So it goes on with m / (sqrt(v) + eps), as `BertAdam` and apex's `FusedAdam(bias_correction=False)` do.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            averages = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(FAR_ALONG, device=p.device if group["fused"] else None)  # as AdamW has it itself
            optimizer.state[p] = {"step": step, **averages}
