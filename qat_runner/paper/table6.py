"""Table 6: seconds to find clipping scalars by OCTAV and by the MSE sweep, for BERT-Base or a run's network."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qat_runner.insertion import QuantizedTensor
from qat_runner.paper.tables import paper
from qat_runner.paper.tensors_of_run import look_at, network_of_run
from qat_runner.quant import IntFormat, mse_sweep, octav
from qat_runner.report.tables import Table

LAYERS, HIDDEN, INNER, HEADS, BATCH, LENGTH, BATCHES = 12, 768, 3072, 12, 4, 384, 10
"""BERT-Base on SQuAD as the paper fine-tunes it; activations are calibrated on 10 batches."""

BITS = (4, 5, 6, 7, 8)
METHODS: dict[str, Callable[..., Tensor]] = {"octav": octav, "mse_sweep": mse_sweep}
PUBLISHED = "published (Xeon, NumPy)"


@dataclass
class Timing:
    """Seconds that each method takes, summed over tensors."""

    network: str
    tensors: dict[str, int] = field(default_factory=lambda: {"weight": 0, "activation": 0})
    seconds: dict[tuple[str, str, int], float] = field(default_factory=dict)
    """(kind, method, bits) -> seconds"""

    def add(self, kind: str, x: Tensor, signed: bool, dim: int | None, count: int = 1, repeats: int = 1) -> None:
        """Time both methods on a tensor and add the result.

        Args:
            kind: weight or activation.
            x: the tensor.
            signed: whether its quantizer is signed.
            dim: dimension with one scalar per index; None: one scalar for the tensor.
            count: number of tensors of this shape; the time is multiplied by it.
            repeats: number of measurements; their median counts.
        """
        self.tensors[kind] += count
        for bits in BITS:
            for name, method in METHODS.items():
                times = []
                for _ in range(repeats):
                    began = time.perf_counter()
                    method(x, IntFormat(bits, signed), dim, check=False)
                    times.append(time.perf_counter() - began)
                key = kind, name, bits
                self.seconds[key] = self.seconds.get(key, 0.0) + count * statistics.median(times)

    def table(self) -> Table:
        """Return seconds per tensor and in total, beside the published ones, which are one number for 4 to 8 bits."""
        bits = [f"{b} bits" for b in BITS]
        each = ("seconds a tensor", f"seconds a tensor, {PUBLISHED}")
        headers = ["tensors", "number", "method", *bits, *each, "in all", f"in all, {PUBLISHED}"]
        rows = [row for kind, number in self.tensors.items() if number for row in self._rows(kind)]
        published = {kind: paper()["table6"][kind]["tensors"] for kind in self.tensors}
        notes = [
            f"{self.network}. {torch.get_num_threads()} CPU threads; OCTAV is compiled, the sweep is plain PyTorch. "
            "Seconds per tensor are given by bits, with their mean; 'in all' (h:mm:ss) is the total for one bit-width.",
            f"Published numbers: {paper()['source']}, for BERT-Base's {published['weight']} weight and "
            f"{published['activation']} activation tensors, on a Xeon with NumPy. Machine and program differ, so the "
            "seconds cannot be compared with ours, and the ratios only roughly.",
        ]
        return Table("table6: Seconds to calibrate a network's tensors", headers, rows, notes)

    def _rows(self, kind: str) -> list[list[str]]:
        """Return a row for each method, and one for their ratio."""
        known, number = paper()["table6"][kind], self.tensors[kind]
        ours = {name: [self.seconds[kind, name, bits] / number for bits in BITS] for name in METHODS}
        rows = []
        for name, label in (("octav", "OCTAV"), ("mse_sweep", "MSE sweep")):
            mean, (published, published_all) = statistics.fmean(ours[name]), known[name]
            seconds = [f"{s:.3g}" for s in (*ours[name], mean)]
            totals = [_clock(mean * number), _clock(published_all)]
            rows.append([f"{kind}s", str(number), label, *seconds, f"{published:.3f}", *totals])
        pairs = zip(ours["mse_sweep"], ours["octav"], strict=True)
        ratio = statistics.fmean(ours["mse_sweep"]) / statistics.fmean(ours["octav"])
        published_ratio = known["mse_sweep"][0] / known["octav"][0]
        ratios = [*(f"{sweep / solved:.0f}" for sweep, solved in pairs), f"{ratio:.0f}", f"{published_ratio:.1f}"]
        return [*rows, [f"{kind}s", "", "sweep / OCTAV", *ratios, "", ""]]


def _clock(seconds: float) -> str:
    """Format seconds as h:mm:ss, m:ss, or m:ss.ss below ten seconds."""
    if seconds < 10:
        return f"0:{seconds:05.2f}"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def synthetic() -> Timing:
    """Time both methods on normally distributed tensors in the shapes of BERT-Base's 74 weights and 1220 activations.

    The weights are those of query, key, value and output, the two of the feed-forward layers, pooler and answer head.
    The activations are the inputs of those layers and the operands of the matrix multiplications in attention.
    """
    timing = Timing("Synthetic tensors of BERT-Base's shapes")
    torch.manual_seed(0)
    for shape, count in (
        ((HIDDEN, HIDDEN), 4 * LAYERS + 1),
        ((INNER, HIDDEN), LAYERS),
        ((HIDDEN, INNER), LAYERS),
        ((2, HIDDEN), 1),
    ):
        timing.add("weight", torch.randn(shape), True, 0, count, repeats=3)
    for activation, count in _activations():
        timing.add("activation", torch.randn(activation), True, None, count, repeats=3)
    return timing


def _activations() -> Iterator[tuple[tuple[int, ...], int]]:
    yield (BATCH, LENGTH, HIDDEN), (5 + 3) * LAYERS * BATCHES + 2 * BATCHES
    yield (BATCH, LENGTH, INNER), LAYERS * BATCHES
    yield (BATCH, HEADS, LENGTH, LENGTH), LAYERS * BATCHES


def of_run(folder: Path) -> Timing:
    """Time both methods on the tensors of a run's network, with activations of 10 calibration batches.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    model, data, config = network_of_run(folder)
    batch_size = config.clipping.calibration_batch_size
    timing = Timing(f"The tensors of {folder.name}")

    def add(tensor: QuantizedTensor, x: Tensor) -> None:
        kind = "weight" if tensor.tensor == "weight" else "activation"
        timing.add(kind, x, tensor.quantizer.format.signed, tensor.quantizer.dim)

    look_at(model, data, batch_size, min(BATCHES, data.train_steps(batch_size)), add)
    return timing
