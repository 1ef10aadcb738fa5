"""Table 6: seconds to find a network's clipping scalars, by OCTAV and by the MSE sweep: BERT-Base's, or a run's."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from qat_runner.insertion import QuantizedTensor
from qat_runner.quant import mse_sweep, octav
from qat_runner.report.tensors_of_run import look_at, network_of_run

LAYERS, HIDDEN, INNER, HEADS, BATCH, LENGTH, BATCHES = 12, 768, 3072, 12, 4, 384, 10
"""BERT-Base on SQuAD as the paper fine-tunes it; activations are calibrated on 10 batches."""

BITS = (4, 5, 6, 7, 8)
METHODS: tuple[Callable[..., Tensor], ...] = (octav, mse_sweep)
HEADERS = ("bits", "weights: OCTAV, s", "MSE sweep, s", "activations: OCTAV, s", "MSE sweep, s", "sweep / OCTAV")


@dataclass
class Timing:
    """Seconds, added up over tensors."""

    network: str
    tensors: dict[str, int] = field(default_factory=lambda: {"weight": 0, "activation": 0})
    seconds: dict[tuple[int, str, int], float] = field(default_factory=dict)
    """(bits, kind, number of the method) -> seconds"""

    def add(self, kind: str, x: Tensor, signed: bool, dim: int | None, count: int = 1, repeats: int = 1) -> None:
        """Time both methods on a tensor.

        Args:
            kind: weight or activation.
            x: the tensor.
            signed: its grid.
            dim: one scalar for each index of it; None: one for all.
            count: how many such tensors there are: as many of one shape take so many times as long.
            repeats: the median of so many counts.
        """
        self.tensors[kind] += count
        for bits in BITS:
            for number, method in enumerate(METHODS):
                times = []
                for _ in range(repeats):
                    began = time.perf_counter()
                    method(x, bits, signed, dim, check=False)
                    times.append(time.perf_counter() - began)
                key = bits, kind, number
                self.seconds[key] = self.seconds.get(key, 0.0) + count * statistics.median(times)

    def text(self) -> str:
        """Markdown."""
        rows = []
        for bits in BITS:
            w_octav, w_sweep, a_octav, a_sweep = (
                self.seconds.get((bits, kind, number), 0.0) for kind in ("weight", "activation") for number in (0, 1)
            )
            ratio = (w_sweep + a_sweep) / (w_octav + a_octav)
            rows.append((bits, f"{w_octav:.3f}", f"{w_sweep:.2f}", f"{a_octav:.2f}", f"{a_sweep:.1f}", f"{ratio:.0f}"))
        table = tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)
        weights, activations = self.tensors["weight"], self.tensors["activation"]
        return (
            f"## table6: seconds to calibrate {weights} weight and {activations} activation tensors\n\n{table}\n\n"
            f"{self.network}. On {torch.get_num_threads()} CPU threads, OCTAV compiled, the sweep in plain PyTorch. "
            f"Published, for BERT-Base: OCTAV is about 10 times faster than the sweep.\n"
        )


def synthetic() -> Timing:
    """Timing of normally distributed tensors of the shapes of BERT-Base's 74 weight and 1220 activation tensors.

    The weights are query, key, value and output, the two of the inner layer, pooler and answer head; the activations
    are the inputs of those layers and the operands of attention's products.
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
    """Timing of the tensors of a run's network, activations on 10 training batches.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    model, data, config = network_of_run(folder)
    assert config.batch_size is not None
    timing = Timing(f"The tensors of {folder.name}")

    def add(tensor: QuantizedTensor, x: Tensor) -> None:
        kind = "weight" if tensor.tensor == "weight" else "activation"
        timing.add(kind, x, tensor.quantizer.signed, tensor.quantizer.dim)

    look_at(model, data, config.batch_size, min(BATCHES, data.train_steps(config.batch_size)), add)
    return timing
