"""Calibration: clipping scalars from the pretrained network, before training (section 5, "static")."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.insert import quantized_tensors


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...]]) -> int:
    """Set every quantizer's scalars to the mean of those that its clipping method finds on each batch.

    Meanwhile the network runs in full precision and in eval mode (BatchNorm with its running statistics); its training
    flags are restored. Weights come out with the scalars of the weights themselves.

    Args:
        model: with static quantizers, or dynamic ones that are to be used with eval_mode running or frozen.
        batches: a few random training batches (the paper: 5), each an input tensor or a tuple of arguments of forward.

    Returns:
        How many batches were used.

    Raises:
        ValueError: no batch, or NaN or infinity in a tensor.
    """
    training = [(module, module.training) for module in model.modules()]
    used = 0
    with ExitStack() as stack:
        for tensor in quantized_tensors(model):
            stack.enter_context(tensor.quantizer.calibrating())
        try:
            model.eval()
            for batch in batches:
                model(*(batch if isinstance(batch, tuple | list) else (batch,)))
                used += 1
        finally:
            for module, flag in training:
                module.training = flag
    if used == 0:
        raise ValueError("calibration needs at least one batch")
    return used
