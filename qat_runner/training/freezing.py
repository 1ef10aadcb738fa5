"""Scalars that are dynamic for a part of training, and static for the rest of it: recipe.freeze_scalars_at."""

import torch
from torch import nn

from qat_runner import distributed
from qat_runner.insertion import quantized_tensors
from qat_runner.quant import IntFormat, Quantizer


def dynamic_activations(model: nn.Module) -> list[Quantizer]:
    """The quantizers of activations that are dynamic and could be static."""
    activations = [t.quantizer for t in quantized_tensors(model) if t.tensor != "weight"]
    return [q for q in activations if q.dynamic and not q.per_token]


def freeze_activations(model: nn.Module) -> None:
    """Make activations' scalars static: the running average of training, mean over the processes that have one.

    Where formats are oriented, the sign of most processes.

    Weights' quantizers stay dynamic, since training goes on; so do those that have seen no training.
    """
    for quantizer in dynamic_activations(model):
        seen = quantizer.seen.reshape(1)
        signs = quantizer.with_orientation(torch.ones_like(quantizer.s))
        figures = [t.reshape(-1) * seen for t in (quantizer.running_s, signs)]
        sums = distributed.all_reduce(torch.cat([*figures, seen]))
        if sums[-1] > 0:
            s, signs = (sums[:-1] / sums[-1]).reshape(2, *quantizer.s.shape)
            oriented = isinstance(quantizer.format, IntFormat) and quantizer.format.oriented
            quantizer.freeze(torch.copysign(s, signs) if oriented else s)
