"""Figure 5: where OCTAV and the MSE sweep part, because the measured MSE has two minima (Appendix G)."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from qat_runner.insertion import QuantizedTensor
from qat_runner.quant import fake_quantize, mse, mse_sweep, octav
from qat_runner.report.figures_of_paper import Sample
from qat_runner.report.plots import CHOSEN, OTHER
from qat_runner.report.tensors_of_run import look_at, network_of_run


@dataclass
class Scalars:
    """Static scalars of one activation tensor, each the mean over batches, and one batch of it."""

    sample: Sample
    octav: float = 0.0
    sweep: float = 0.0

    @property
    def ratio(self) -> float:
        """Of the larger to the smaller."""
        low, high = sorted((self.octav, self.sweep))
        return high / low if low > 0 else 1.0


def static_scalars(folder: Path, bits: int = 4, batches: int = 10) -> list[Scalars]:
    """Scalars of a run's activations by OCTAV and by the MSE sweep, as static quantization finds them (section 5).

    Raises:
        ConfigError: the folder holds no finished run.
    """
    model, data, config = network_of_run(folder)
    assert config.batch_size is not None
    batches = min(batches, data.train_steps(config.batch_size))
    found: dict[str, Scalars] = {}

    def add(tensor: QuantizedTensor, x: Tensor) -> None:
        if tensor.tensor == "weight":
            return
        signed = tensor.quantizer.signed
        row = found.setdefault(tensor.name, Scalars(Sample(tensor.name, x.flatten(), signed)))
        row.octav += octav(x, bits, signed).item() / batches
        row.sweep += mse_sweep(x, bits, signed).item() / batches

    look_at(model, data, config.batch_size, batches, add)
    return list(found.values())


def mse_curve(sample: Sample, bits: int, points: int = 100) -> tuple[list[float], list[float]]:
    """The candidates of the MSE sweep, k / points of the maximum, and the measured MSE at each."""
    top = sample.x.abs().max().item()
    candidates = [k / points * top for k in range(1, points + 1)]
    return candidates, [mse(sample.x, fake_quantize(sample.x, s, bits, sample.signed)).item() for s in candidates]


def minima(curve: Sequence[float]) -> int:
    """How many points of a curve are lower than both neighbours, the ends included."""
    bounded = [math.inf, *curve, math.inf]
    return sum(a > b < c for a, b, c in zip(bounded, bounded[1:], bounded[2:], strict=False))


def draw(rows: Sequence[Scalars], bits: int = 4, shown: int = 2) -> Figure:
    """Static scalars tensor by tensor, by OCTAV and by the sweep; densities and MSE of those where they part most."""
    figure = plt.figure(figsize=(12, 4 + 3.2 * shown), layout="constrained")
    layout: list[list[str]] = [["all", "all"], *([f"density{i}", f"mse{i}"] for i in range(shown))]
    axes: dict[str, Axes] = figure.subplot_mosaic(layout)  # type: ignore[arg-type]
    places = range(len(rows))
    axes["all"].plot(places, [row.octav for row in rows], color=CHOSEN, marker="o", markersize=3, label="OCTAV")
    axes["all"].plot(places, [row.sweep for row in rows], color=OTHER, marker="s", markersize=3, label="MSE sweep")
    axes["all"].set(
        yscale="log", xlabel="activation tensor, in order", ylabel="s", title=f"static scalars at {bits} bits"
    )
    for i, row in enumerate(sorted(rows, key=lambda row: row.ratio, reverse=True)[:shown]):
        candidates, curve = mse_curve(row.sample, bits)
        axes[f"density{i}"].hist(row.sample.x.float().numpy(), bins=200, density=True, log=True, color="grey")
        axes[f"density{i}"].set(title=row.sample.name, xlabel="x", ylabel="density")
        axes[f"mse{i}"].plot(candidates, curve, color="grey")
        axes[f"mse{i}"].set(
            yscale="log",
            title="1 minimum" if minima(curve) == 1 else f"{minima(curve)} minima",
            xlabel="s",
            ylabel="MSE",
        )
        for ax in (axes[f"density{i}"], axes[f"mse{i}"]):
            ax.axvline(row.octav, color=CHOSEN, label=f"OCTAV {row.octav:.3g}")
            ax.axvline(row.sweep, color=OTHER, linestyle="--", label=f"sweep {row.sweep:.3g}")
    for ax in axes.values():
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure


def table(rows: Sequence[Scalars], bits: int = 4) -> str:
    """What figure 5 shows, as numbers."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("tensor", "signed", "octav", "sweep", "ratio", "minima_of_mse"))
    for row in rows:
        _, curve = mse_curve(row.sample, bits)
        figures = (f"{value:.6g}" for value in (row.octav, row.sweep, row.ratio))
        writer.writerow((row.sample.name, row.sample.signed, *figures, minima(curve)))
    return out.getvalue()
