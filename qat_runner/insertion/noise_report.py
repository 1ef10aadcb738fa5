"""Quantization noise of every tensor of a network, beside what max-scaling would give."""

from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor, nn

from qat_runner.insertion.columns import columns
from qat_runner.insertion.insert import quantized_tensors
from qat_runner.insertion.watch import Batches, watch
from qat_runner.quant import IntFormat, Quantizer, maximum, measure, noise_of


@dataclass(frozen=True)
class LayerNoise:
    """Noise of one tensor: a row of layers.csv, without its epoch."""

    layer: str
    tensor: str
    bits: int
    signed: bool
    granularity: str
    s: float
    """clipping scalar, the mean over the rows where there are several"""
    mse: float
    """in squared units of the tensor"""
    sqnr_db: float
    clipped_fraction: float
    """0 to 1"""
    max_sqnr_db: float
    """what max-scaling gives on the same tensor, with plain integers of as many bits"""


class NoiseReport(list[LayerNoise]):
    """Rows, one a tensor; printed as a table."""

    def __str__(self) -> str:
        return columns([field.name for field in fields(LayerNoise)], [astuple(row) for row in self])


@torch.no_grad()
def noise_report(model: nn.Module, batches: Batches) -> NoiseReport:
    """Noise of every quantized tensor that the batches reach, averaged over the batches (SQNR: in dB).

    Args:
        model: with quantizers; runs in eval mode, and is in the mode that it was in afterwards.
        batches: each an input tensor, or a tuple of arguments of forward, without labels.

    Returns:
        A row a tensor, in order of registration, weight before input; none where there is no batch.

    Raises:
        ValueError: a quantizer met NaN or infinity.
        RuntimeError: a static quantizer has no scalars yet.
    """
    names = {t.quantizer: (t.layer, t.tensor) for t in quantized_tensors(model)}
    figures: dict[Quantizer, list[Tensor]] = {quantizer: [] for quantizer in names}

    def look(quantizer: Quantizer, x: Tensor) -> None:
        s, format, x = quantizer.latest, quantizer.format, quantizer.rows(x)
        noise = noise_of(x, quantizer.quantized(x, s), s, format, quantizer.clipped(x))
        plain = IntFormat(format.bits, format.signed)
        rival = measure(x, maximum(x, plain, quantizer.dim, check=False), plain)
        figures[quantizer].append(torch.stack([format.reach(s).double().mean(), *noise, rival.sqnr_db]))

    watch(model, batches, look)
    seen = [(q, torch.stack(rows).mean(0)) for q, rows in figures.items() if rows]
    values = torch.stack([v for _, v in seen]).tolist() if seen else []  # one wait for all of them
    return NoiseReport(
        LayerNoise(*names[q], q.format.bits, q.format.signed, q.granularity, *row)
        for (q, _), row in zip(seen, values, strict=True)
    )
