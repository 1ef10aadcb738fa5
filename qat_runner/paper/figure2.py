"""Figure 2: OCTAV against a brute-force sweep, for every weight and activation of a network."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from qat_runner.insertion import QuantizedTensor
from qat_runner.paper.tensors_of_run import look_at, look_at_weights, network_of_run, network_of_weights
from qat_runner.quant import IntFormat, fake_quantize, mse, mse_sweep, octav
from qat_runner.training.plots import CHOSEN, OTHER

BITS = (4, 8)


@dataclass(frozen=True)
class Comparison:
    """The clipping scalars and MSE that both methods find for a tensor."""

    tensor: str
    kind: str
    """weight or activation"""
    bits: int
    signed: bool
    sweep: float
    """clipping scalar, in units of the tensor; with one scalar per row, their mean (each row is swept separately)"""
    octav: float
    """the same for OCTAV"""
    sweep_mse: float
    """measured MSE, in squared units of the tensor"""
    octav_mse: float


@torch.no_grad()
def compare(tensor: QuantizedTensor, x: Tensor) -> list[Comparison]:
    """Apply both methods to a tensor, at each of BITS.

    Args:
        tensor: its name and quantizer, which gives signedness and granularity.
        x: the tensor, of any shape.
    """
    kind = "weight" if tensor.tensor == "weight" else "activation"
    signed, dim = tensor.quantizer.format.signed, tensor.quantizer.dim
    found = []
    for bits in BITS:
        format = IntFormat(bits, signed)
        both = (mse_sweep(x, format, dim, together=False), octav(x, format, dim))
        costs = (mse(x, fake_quantize(x, s, format)).item() for s in both)
        found.append(Comparison(tensor.name, kind, bits, signed, *(s.mean().item() for s in both), *costs))
    return found


def of_run(folder: Path) -> list[Comparison]:
    """Compare both methods on all weights of a run's network, and all activations on a training batch of at most 32.

    Raises:
        ConfigError: the folder holds no run with a checkpoint.
    """
    model, data, config = network_of_run(folder)
    found: list[Comparison] = []
    look_at(model, data, min(32, config.batch_size), 1, lambda tensor, x: found.extend(compare(tensor, x)))
    return found


def of_weights(model: str, weights: str, dataset: str, data_dir: Path | None) -> list[Comparison]:
    """Compare both methods on all weights of an image network, and on all activations for a training batch of 32.

    Args:
        model, weights, dataset: as for `qat-run`.
        data_dir: location of the data set; None compares the weights only.

    Raises:
        ConfigError: the network, file or data do not exist, or do not fit together.
    """
    network, data = network_of_weights(model, weights, dataset, data_dir)
    found: list[Comparison] = []
    if data is None:
        look_at_weights(network, lambda tensor, x: found.extend(compare(tensor, x)))
    else:
        look_at(network, data, 32, 1, lambda tensor, x: found.extend(compare(tensor, x)))
    return found


def draw(rows: Sequence[Comparison]) -> Figure:
    """Plot (a) the clipping scalar and (b) the measured MSE against the layer, with one column for weights and one for
    activations; the sweep is solid with a colour per bit-width, and OCTAV is dashed."""
    kinds = [kind for kind in ("weight", "activation") if any(row.kind == kind for row in rows)]
    figure, axes = plt.subplots(2, len(kinds), figsize=(6.5 * len(kinds), 7), layout="constrained", squeeze=False)
    for column, kind in enumerate(kinds):
        for bits, colour in zip(BITS, (CHOSEN, OTHER), strict=True):
            mine = [row for row in rows if (row.kind, row.bits) == (kind, bits)]
            for ax, solid, dashed in (
                (axes[0, column], [row.sweep for row in mine], [row.octav for row in mine]),
                (axes[1, column], [row.sweep_mse for row in mine], [row.octav_mse for row in mine]),
            ):
                ax.plot(solid, "-", color=colour, label=f"MSE sweep, {bits} bits")
                ax.plot(dashed, "--", color="black", linewidth=1, label=f"OCTAV, {bits} bits")
        axes[0, column].set(yscale="log", title=f"{kind}s", ylabel="clipping scalar s")
        axes[1, column].set(yscale="log", xlabel=f"{kind} tensor, in network order", ylabel="measured MSE")
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure


def table(rows: Sequence[Comparison]) -> str:
    """Return the numbers of figure 2 as CSV, with a row for each tensor and bit-width."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("tensor", "kind", "bits", "signed", "s_sweep", "s_octav", "mse_sweep", "mse_octav"))
    for row in rows:
        figures = (f"{value:.6g}" for value in (row.sweep, row.octav, row.sweep_mse, row.octav_mse))
        writer.writerow((row.tensor, row.kind, row.bits, row.signed, *figures))
    return out.getvalue()
