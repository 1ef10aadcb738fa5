"""The optimizer and the learning rate of a stage of a recipe."""

import math
from typing import Any

import torch
from torch import nn

from qat_runner.config import Optimizer, Schedule, Spared, StageConfig
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.layers import QuantLayer
from qat_runner.quant import LearnedQuantizer


def learning_rate(stage: StageConfig, base: float, epochs: int, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of one step, as a function of its position in training, so that no state is needed.

    Args:
        stage: provides the schedule, decay and warm-up.
        base: learning rate before any decay.
        epochs: total number of epochs.
        epoch: 0-based index of the epoch.
        step: 0-based index of the step within the epoch.
        steps: number of steps per epoch.
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
    """Create the optimizer of a stage: SGD or AdamW.

    SGD applies weight decay to all parameters, BatchNorm included, as in the paper's recipes. AdamW exempts some
    parameters from weight decay (see `without_decay`) and runs with or without bias correction.

    On a GPU, PyTorch's fused implementation is used: it takes one or two kernel launches for all parameters, and under
    fp16 it skips a step that overflowed without the GradScaler having to wait for the device. On a CPU, the fused
    implementation rounds differently and is hardly faster.

    For learned clipping scalars, the weight-decay rules of their publications apply (see `quant.learned`).
    """
    fused = fuses(next(model.parameters()).device)
    adamw = stage.optimizer == Optimizer.adamw
    free = without_decay(model, stage.spared) if adamw else set()
    decay = {p: 0.0 if p in free else stage.weight_decay for p in model.parameters()}
    for tensor in quantized_tensors(model):
        if isinstance(tensor.quantizer, LearnedQuantizer):
            method = tensor.quantizer.method
            decay[tensor.quantizer.learned] = stage.weight_decay if method.decays else 0.0
            if tensor.tensor == "weight":
                layer = tensor.module
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


def without_decay(model: nn.Module, which: Spared) -> set[nn.Parameter]:
    """Return the parameters of a network that AdamW exempts from weight decay.

    Args:
        model: any network.
        which: vectors: parameters with fewer than two dimensions, as in the fine-tuning of BERT. tokens: additionally
            the position and token parameters of vision transformers, found through `no_weight_decay` of timm's
            networks and through the names and shapes that other implementations use.
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
            of_a_layer = p.ndim > 2 and p.numel() == max(p.shape)  # a layer scale, [C, 1, 1]
            if name in listed or of_a_layer or name.rpartition(".")[2] in _POSITIONS:
                found.add(p)
    return found


_POSITIONS = (
    *("pos_embed", "pos_embedding", "position_embeddings", "relative_position_bias_table"),
    *("cls_token", "class_token", "dist_token", "distillation_token"),
)
"""The names of position and token parameters in timm, torchvision and transformers."""


def fuses(device: torch.device) -> bool | None:
    """Return whether parameters on a device get a fused optimizer; None leaves the choice to PyTorch."""
    return True if device.type == "cuda" else None


def _start_from_zero(optimizer: torch.optim.SGD) -> None:
    """Initialize the momentum buffers of fused SGD with zeros.

    Otherwise PyTorch's fused SGD creates them at the first step in uninitialized memory. If that step overflows under
    fp16 and is skipped, the memory is not filled, and training would continue from arbitrary values. Other SGD
    implementations are not called in a skipped step.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


FAR_ALONG = 100_000.0
"""A step count t at which Adam's bias corrections, 1 - 0.9^t and 1 - 0.999^t, equal 1 in double precision."""


def _start_far_along(optimizer: torch.optim.AdamW) -> None:
    """Disable bias correction, for which PyTorch's AdamW has no option.

    The moving averages start at zero as usual, but the step count starts at FAR_ALONG. The update direction is then
    m / (sqrt(v) + eps), as in `BertAdam` and apex's `FusedAdam(bias_correction=False)`.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            averages = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(FAR_ALONG, device=p.device if group["fused"] else None)  # where AdamW itself keeps it
            optimizer.state[p] = {"step": step, **averages}
