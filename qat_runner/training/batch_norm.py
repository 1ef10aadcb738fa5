"""Re-estimation of the BatchNorm statistics for the current state of a network.

In training, the statistics are moving averages over steps between which weights flip from one code to another, so that
they match none of these states of the network: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training",
ICML 2022, section 4.1.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_runner import distributed
from qat_runner.data import Batch
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.insert import checking


def norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm modules that track running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch], compute: Callable[[nn.Module, Any], object]) -> None:
    """Set the statistics of every BatchNorm to the plain mean of the statistics of the given batches.

    Each batch is normalized by its own statistics, as in training, and everything else runs as in evaluation: dropout
    is off, and quantizers do not update their state. (`torch.optim.swa_utils.update_bn` would put these in training
    mode as well.) With several processes, all end up with the same statistics: the mean over the processes.

    Args:
        model: the network; it is in eval mode afterwards.
        batches: at least one batch. Each process passes the same number of batches, of its own samples.
        compute: calls a model with the inputs of a batch.
    """
    with _gathering(model), checking([t.quantizer for t in quantized_tensors(model)], False):
        for batch in batches:
            compute(model, batch.inputs)
    for norm in norms(model):
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            distributed.all_reduce(statistic).div_(distributed.shard().world)


@contextmanager
def _gathering(model: nn.Module) -> Iterator[None]:
    """Context in which every BatchNorm accumulates statistics from scratch and everything else is in eval mode."""
    model.eval()
    momenta = {norm: norm.momentum for norm in norms(model)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            norm.eval()
