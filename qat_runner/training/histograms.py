"""histograms.json: how the values of every quantized tensor are distributed over its grid at the end of a run.

Measured once, after training, on the same batches as the quantization noise. The histogram of a weight covers its
elements once, however many batches there are.
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
"""Largest number of elements counted at a time, because PyTorch counts in float32."""

REACH = 4.0
"""Largest extent of the bins, in clipping scalars: distant outliers would squeeze all other values into one bin."""


def record_histograms(folder: Path, config: Config, model: nn.Module, data: Data) -> None:
    """Write histograms.json into a run folder, unless the run does not measure quantization noise.

    Args:
        folder: the run folder.
        config: resolved config of the run.
        model: trained model with its quantizers.
        data: data of the run; its first validation batches are used.
    """
    if config.quantization.full_precision or config.noise_batches == 0:
        return
    batches = unsharded(data).val_batches(config.dataset.val_batch_size, config.noise_batches)
    with autocast(data.device, config.amp):
        found = histograms(model, (batch.inputs for batch in batches))
    HISTOGRAMS.write(folder, found)


@torch.no_grad()
def histograms(model: nn.Module, batches: Batches) -> list[Histogram]:
    """Return the histograms of all quantized tensors that the batches reach. Waits for the device at each tensor.

    Args:
        model: model whose quantizers have clipping scalars; it runs in eval mode, and its mode is restored afterwards.
        batches: each an input tensor, or a tuple of arguments of forward; the first batch determines the bins.
    """
    tensors = {t.quantizer: t for t in quantized_tensors(model)}
    tallies: dict[Quantizer, _Tally] = {}

    def look(quantizer: Quantizer, x: Tensor) -> None:
        s, x = quantizer.latest().float(), quantizer.rows(x)
        s = s if quantizer.format.parts == 1 else quantizer.format.reach(s)
        x = x.float() / torch.where(s == 0, 1.0, s)  # mirrored if the scale is negative, like the levels
        if quantizer not in tallies:
            tallies[quantizer] = _Tally(x)
        elif tensors[quantizer].tensor == "weight":
            return  # does not change from batch to batch
        tallies[quantizer].add(x)

    watch(model, batches, look)
    return [tallies[q].histogram(t.layer, t.tensor, q) for q, t in tensors.items() if q in tallies]


def _levels(quantizer: Quantizer) -> list[float]:
    """Return the levels of a quantizer in units of s.

    For formats with two clipping bounds, the unit is the larger absolute value of the two, and the list is empty unless
    one pair of bounds holds for the whole tensor.
    """
    format, s = quantizer.format, quantizer.latest().float()
    if format.parts == 1:
        return list(format.levels)
    if s.ndim > 1:
        return []
    codes = torch.arange(2**format.bits, dtype=torch.float32, device=s.device)
    return [float(level) for level in format.decode(codes, s) / format.reach(s).clamp(min=1e-38)]


class _Tally:
    """Accumulates counts in bins chosen for the first tensor, which may have any shape and is in units of s."""

    def __init__(self, x: Tensor) -> None:
        self.lowest, self.highest = (end.item() for end in torch.aminmax(x))
        self.low = max(self.lowest, -REACH)
        self.high = max(min(self.highest, REACH), self.low + 1e-3)  # bins need a width even for a constant tensor
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
            "s": format.reach(quantizer.latest()).float().mean().item(),
            "low": self.low,
            "high": self.high,
            "lowest": self.lowest,
            "highest": self.highest,
            "beyond": self.beyond,
            "counts": [int(n) for n in self.counts.tolist()],
            "levels": _levels(quantizer) if 2**format.bits <= LEVELS else [],
        }
        if format.parts == 2 and quantizer.dim is None:
            s = quantizer.latest().float()
            found["ends"] = (s / format.reach(s).clamp(min=1e-38)).tolist()
        return found
