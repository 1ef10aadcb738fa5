"""Quantization noise of every tensor of a network, next to the noise of max-scaling."""

from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor, nn

from qat_runner.insertion.columns import columns
from qat_runner.insertion.insert import quantized_tensors
from qat_runner.insertion.watch import Batches, watch
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.quant import IntFormat, Quantizer, maximum, measure, noise_of


@dataclass(frozen=True)
class LayerNoise:
    """Noise of one tensor: a row of layers.csv, without the epoch."""

    layer: str
    tensor: str
    bits: int
    signed: bool
    granularity: str
    s: float
    """clipping scalar; the mean over rows if there are several"""
    mse: float
    """in squared units of the tensor"""
    sqnr_db: float
    clipped_fraction: float
    """0 to 1"""
    max_sqnr_db: float
    """SQNR of max-scaling on the same tensor, with plain integers of the same bit-width"""


class NoiseReport(list[LayerNoise]):
    """One row per tensor; prints as a table."""

    def __str__(self) -> str:
        return columns([field.name for field in fields(LayerNoise)], [astuple(row) for row in self])


@torch.no_grad()
def noise_report(model: nn.Module, batches: Batches) -> NoiseReport:
    """Measure the noise of every quantized tensor that the batches reach, averaged over the batches (SQNR: in dB).

    Args:
        model: with quantizers; runs in eval mode, and returns to its previous mode afterwards.
        batches: as in `calibrate`.

    Returns:
        One row per tensor, in order of registration, weight before input; no rows if there is no batch.

    Raises:
        ValueError: the model has no quantizers, or a quantizer was given NaN or infinity.
        RuntimeError: a static quantizer has no scalars yet.
    """
    names = {t.quantizer: (t.layer, t.tensor) for t in quantized_tensors(model)}
    if not names:
        raise ValueError(f"{type(unwrapped(model)).__name__} has no quantizers, whose noise could be measured")
    figures: dict[Quantizer, list[Tensor]] = {quantizer: [] for quantizer in names}

    def look(quantizer: Quantizer, x: Tensor) -> None:
        s, format, x = quantizer.latest(), quantizer.format, quantizer.rows(x)
        noise = noise_of(x, quantizer.quantized(x, s), s, format, quantizer.clipped(x))
        plain = IntFormat(format.bits, format.signed)
        rival = measure(x, maximum(x, plain, quantizer.dim, check=False), plain)
        figures[quantizer].append(torch.stack([format.reach(s).double().mean(), *noise, rival.sqnr_db]))

    watch(model, batches, look)
    seen = [(q, torch.stack(rows).mean(0)) for q, rows in figures.items() if rows]
    values = torch.stack([v for _, v in seen]).tolist() if seen else []  # waits for the device once
    return NoiseReport(
        LayerNoise(*names[q], q.format.bits, q.format.signed, q.granularity, *row)
        for (q, _), row in zip(seen, values, strict=True)
    )
