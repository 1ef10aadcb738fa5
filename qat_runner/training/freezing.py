"""Clipping scalars that are dynamic in the first part of training and static afterwards: recipe.freeze_scalars_at."""

import torch
from torch import nn

from qat_runner import distributed
from qat_runner.insertion import quantized_tensors
from qat_runner.quant import IntFormat, Quantizer


def dynamic_activations(model: nn.Module) -> list[Quantizer]:
    """Return the quantizers of activations whose clipping scalars are dynamic and could be made static."""
    activations = [t.quantizer for t in quantized_tensors(model) if t.tensor != "weight"]
    return [q for q in activations if q.dynamic and not q.per_token]


def freeze_activations(model: nn.Module) -> None:
    """Make the clipping scalars of activations static.

    Each becomes the running average of training, averaged over the processes that have one; in oriented ranges its sign
    is that of the majority of the processes.

    Quantizers of weights stay dynamic because training continues, and so do quantizers that training has not reached.
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
