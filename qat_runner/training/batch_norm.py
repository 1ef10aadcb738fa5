"""BatchNorm's statistics, taken anew of the network as it is.

In training they are moving averages over steps between which weights flip from one code to another, and belong to none
of the networks that these were: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
section 4.1.
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
    """All that keep statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch], compute: Callable[[nn.Module, Any], object]) -> None:
    """Make the statistics of every BatchNorm the plain mean of those of batches.

    Each is normalized by statistics of its own then, as in training, while all else is as in evaluation: without
    dropout, and quantizers remember nothing. `torch.optim.swa_utils.update_bn` would train these as well. Several
    processes come to the same statistics, the mean of those of all.

    Args:
        model: is in eval mode afterwards.
        batches: at least one; of several processes, each has as many, of its own samples.
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
    """While open, every BatchNorm adds up, from nothing, and all else is in eval mode."""
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
