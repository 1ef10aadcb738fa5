"""The distribution of every quantized tensor, in units of its clipping scalars."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.calibrate import evaluating
from qat_runner.insertion.insert import quantized_tensors
from qat_runner.quant import Quantizer

BINS = 100


@dataclass(frozen=True)
class Histogram:
    """Of x / s, so that one grid stands for all channels of a weight."""

    layer: str
    tensor: str
    bits: int
    signed: bool
    granularity: str
    s: float
    """clipping scalar of the latest batch, the mean over the channels where there are several"""
    low: float
    """left end of the first bin, in units of s; values beyond the ends count in the first and last bin"""
    high: float
    counts: tuple[int, ...]


@torch.no_grad()
def histograms(model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...]]) -> list[Histogram]:
    """Histograms of all quantized tensors that the batches reach; a weight's is of itself.

    Args:
        model: with quantizers that have scalars; runs in eval mode, and is in the mode that it was in afterwards.
        batches: each an input tensor, or a tuple of arguments of forward; the first sets the ranges.
    """
    tensors = {t.quantizer: t for t in quantized_tensors(model)}
    counts: dict[Quantizer, Tensor] = {}
    ranges: dict[Quantizer, tuple[float, float]] = {}

    def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, Quantizer) and quantizer.last_s is not None
        s = quantizer.last_s.float()
        x = args[0].float() / torch.where(s > 0, s, 1.0)
        if quantizer not in ranges:
            low, high = torch.aminmax(x)
            ranges[quantizer] = (min(low.item(), 0.0), max(high.item(), 1.0))
        elif tensors[quantizer].tensor == "weight":
            return  # the same again
        low_end, high_end = ranges[quantizer]
        found = torch.histc(x.clamp(low_end, high_end), BINS, low_end, high_end)
        counts[quantizer] = counts.get(quantizer, torch.zeros_like(found)) + found

    handles = [quantizer.register_forward_hook(hook) for quantizer in tensors]
    try:
        with evaluating(model):
            for batch in batches:
                model(*(batch if isinstance(batch, tuple | list) else (batch,)))
    finally:
        for handle in handles:
            handle.remove()
    return [_histogram(tensors[q].layer, tensors[q].tensor, q, ranges[q], counts[q]) for q in tensors if q in counts]


def _histogram(layer: str, tensor: str, quantizer: Quantizer, ends: tuple[float, float], counts: Tensor) -> Histogram:
    assert quantizer.last_s is not None
    return Histogram(
        layer,
        tensor,
        quantizer.bits,
        quantizer.signed,
        quantizer.granularity,
        quantizer.last_s.float().mean().item(),
        *ends,
        tuple(int(n) for n in counts.tolist()),
    )
