"""histograms.json: how the values of every quantized tensor lie on its grid, at the end of a run.

Measured once, when all training is done, on the batches that noise is measured on; a weight's is of itself.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from qat_runner.config import Config
from qat_runner.data import Data
from qat_runner.data.batches import unsharded
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.watch import Batches, watch
from qat_runner.quant import Quantizer
from qat_runner.runs.records import HISTOGRAMS, LEVELS, Histogram
from qat_runner.training.measure import autocast

BINS = 100

COUNTED = 2**24
"""Elements that are counted at a time: PyTorch does so in float32."""

REACH = 4.0
"""Clipping scalars that bins extend to, at most: a few outliers far out would leave one bin for all that matters."""


def record_histograms(folder: Path, config: Config, model: nn.Module, data: Data) -> None:
    """Write histograms.json into a run's folder; nothing for a run whose noise is not measured either.

    Args:
        folder: of the run.
        config: resolved.
        model: as trained, with its quantizers.
        data: whose first validation batches are used.
    """
    if config.quantization.full_precision or config.noise_batches == 0:
        return
    batches = unsharded(data).val_batches(config.dataset.val_batch_size, config.noise_batches)
    with autocast(data.device, config.amp):
        found = histograms(model, (batch.inputs for batch in batches))
    HISTOGRAMS.write(folder, found)


@torch.no_grad()
def histograms(model: nn.Module, batches: Batches) -> list[Histogram]:
    """Histograms of all quantized tensors that the batches reach. Waits for the device at each tensor.

    Args:
        model: with quantizers that have scalars; runs in eval mode, and is in the mode that it was in afterwards.
        batches: each an input tensor, or a tuple of arguments of forward; the first sets the bins.
    """
    tensors = {t.quantizer: t for t in quantized_tensors(model)}
    tallies: dict[Quantizer, _Tally] = {}

    def look(quantizer: Quantizer, x: Tensor) -> None:
        s, x = quantizer.latest.float(), quantizer.rows(x)
        s = s if quantizer.format.parts == 1 else quantizer.format.reach(s)
        x = x.float() / torch.where(s == 0, 1.0, s)  # mirrored where the scale is negative, as the levels are
        if quantizer not in tallies:
            tallies[quantizer] = _Tally(x)
        elif tensors[quantizer].tensor == "weight":
            return  # the same again
        tallies[quantizer].add(x)

    watch(model, batches, look)
    return [tallies[q].histogram(t.layer, t.tensor, q) for q, t in tensors.items() if q in tallies]


def _levels(quantizer: Quantizer) -> list[float]:
    """Of a quantizer, in units of s; or, with two ends, of how far they reach, where there is one pair of them."""
    format, s = quantizer.format, quantizer.latest.float()
    if format.parts == 1:
        return list(format.levels)
    if s.ndim > 1:
        return []
    codes = torch.arange(2**format.bits, dtype=torch.float32, device=s.device)
    return [float(level) for level in format.decode(codes, s) / format.reach(s).clamp(min=1e-38)]


class _Tally:
    """Counts that add up, in bins that suit the first tensor, any shape, in units of s."""

    def __init__(self, x: Tensor) -> None:
        self.lowest, self.highest = (end.item() for end in torch.aminmax(x))
        self.low = max(self.lowest, -REACH)
        self.high = max(min(self.highest, REACH), self.low + 1e-3)  # of a constant tensor, too, bins have a width
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.beyond = 0

    def add(self, x: Tensor) -> None:
        lowest, highest = (end.item() for end in torch.aminmax(x))
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        for part in x.reshape(-1).split(COUNTED):
            found = torch.histc(part, BINS, self.low, self.high).double().cpu()
            self.counts += found
            self.beyond += part.numel() - int(found.sum())

    def histogram(self, layer: str, tensor: str, quantizer: Quantizer) -> Histogram:
        format = quantizer.format
        found: Histogram = {
            "layer": layer,
            "tensor": tensor,
            "bits": format.bits,
            "signed": format.signed,
            "granularity": quantizer.granularity,
            "s": format.reach(quantizer.latest).float().mean().item(),
            "low": self.low,
            "high": self.high,
            "lowest": self.lowest,
            "highest": self.highest,
            "beyond": self.beyond,
            "counts": [int(n) for n in self.counts.tolist()],
            "levels": _levels(quantizer) if 2**format.bits <= LEVELS else [],
        }
        if format.parts == 2 and quantizer.dim is None:
            s = quantizer.latest.float()
            found["ends"] = (s / format.reach(s).clamp(min=1e-38)).tolist()
        return found
