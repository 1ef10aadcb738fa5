"""Evaluating a model on a data set, and measuring the excess MSE of warm starts."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import Amp
from qat_runner.data import Batch
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.insert import checking
from qat_runner.quant import Quantizer, measure
from qat_runner.tasks import Task, Totals


def autocast(device: torch.device, amp: Amp) -> AbstractContextManager[object]:
    """Return the context that sets the precision of a forward pass: none, bf16 or fp16."""
    if amp == Amp.none:
        return nullcontext()
    return torch.autocast(device.type, dtype={Amp.bf16: torch.bfloat16, Amp.fp16: torch.float16}[amp])


@torch.inference_mode()
def evaluate(
    task: Task[Any],
    model: nn.Module,
    batches: Iterable[Batch],
    totals: Totals,
    amp: Amp,
    seen: Callable[[int, Totals], object] = lambda samples, totals: None,
) -> None:
    """Evaluate the model on batches in eval mode, adding to the totals; `seen` is called after each batch.

    Raises:
        ValueError: a quantizer that solves for its clipping scalar received NaN or infinite values, and they reached
            the logits.
    """
    model.eval()
    quantizers = [t.quantizer for t in quantized_tensors(model)]
    with checking(quantizers, False):
        for batch in batches:
            with autocast(totals.device, amp):
                logits = task.compute(model, batch.inputs)
                if torch.isnan(logits).any():  # the only wait for the device per batch
                    with checking(quantizers, True):  # the quantizer that received NaN or infinity raises
                        task.compute(model, batch.inputs)
            totals.add(task.loss(logits, batch.targets), logits, batch.targets)
            seen(batch.size, totals)


class WarmStartExcess:
    """Measures the excess MSE of warm-started clipping scalars over converged ones in training. Slow: for experiments.

    Args:
        model: the model whose dynamic quantizers are measured while they train.
    """

    def __init__(self, model: nn.Module) -> None:
        self._step: list[Tensor] = []
        for tensor in quantized_tensors(model):
            tensor.quantizer.register_forward_hook(self._measure)

    def _measure(self, quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, Quantizer)
        if not (quantizer.training and quantizer.dynamic and quantizer.method.warm and args[0].numel()):
            return
        x, s = quantizer.rows(args[0].detach()), quantizer.latest()
        converged = quantizer.scalars_of(x, check=False)
        ours, best = (measure(x, t, quantizer.format).mse for t in (s, converged))
        self._step.append(torch.where(best > 0, ours / best - 1, 0.0))

    def take(self) -> Tensor:
        """Return the relative excess of the tensors quantized since the last call: mean and maximum, [2], float64."""
        excess = torch.stack(self._step) if self._step else torch.zeros(1, dtype=torch.float64)
        self._step.clear()
        return torch.stack([excess.mean(), excess.max()])
