"""Figure 5: where OCTAV and the MSE sweep disagree because the measured MSE has two minima (Appendix G)."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from qat_runner.insertion import QuantizedTensor
from qat_runner.paper.tensor_figures import Sample
from qat_runner.paper.tensors_of_run import look_at, network_of_run
from qat_runner.quant import IntFormat, fake_quantize, mse, mse_sweep, octav
from qat_runner.training.plots import CHOSEN, OTHER

BATCHES = 10
"""Number of calibration batches, as in the paper."""

SHOWN = 2
"""Number of layers shown in detail: those where the two methods disagree most."""


@dataclass
class Input:
    """The input of a layer, with its clipping scalars, one per batch."""

    name: str
    signed: bool
    minima: int
    """number of local minima of the measured MSE on the first batch"""
    octav: list[float] = field(default_factory=list)
    sweep: list[float] = field(default_factory=list)

    @property
    def static_octav(self) -> float:
        """The static scalar of OCTAV: the mean over batches (section 5)."""
        return sum(self.octav) / len(self.octav)

    @property
    def static_sweep(self) -> float:
        """The static scalar of the sweep: the mean over batches."""
        return sum(self.sweep) / len(self.sweep)

    @property
    def ratio(self) -> float:
        """The larger static scalar divided by the smaller one."""
        low, high = sorted((self.static_octav, self.static_sweep))
        return high / low if low > 0 else 1.0


@dataclass(frozen=True)
class View:
    """One batch of an input: the density of its values, and the MSE of each candidate clipping scalar."""

    density: np.ndarray
    """[bins]"""
    edges: np.ndarray
    """[bins + 1], in units of x"""
    candidates: list[float]
    curve: list[float]
    """the measured MSE at each candidate"""
    octav: float
    octav_mse: float


def inputs_of_run(folder: Path, bits: int = 4, batches: int = BATCHES) -> tuple[list[Input], dict[str, list[View]]]:
    """Return static scalars of a run's layer inputs by OCTAV and by the sweep, and views of where they disagree most.

    Operands of matrix multiplications in attention are left out, as in the paper's figure.

    Returns:
        The inputs in layer order, and for SHOWN of them, by name, a view of each batch.

    Raises:
        ConfigError: the folder holds no run with a checkpoint.
    """
    model, data, config = network_of_run(folder)
    batch_size = config.clipping.calibration_batch_size
    batches = min(batches, data.train_steps(batch_size))
    found: dict[str, Input] = {}

    def solve(tensor: QuantizedTensor, x: Tensor) -> None:
        if tensor.tensor != "input":
            return
        if tensor.name not in found:
            sample = Sample(tensor.name, x, tensor.quantizer.format.signed)
            found[tensor.name] = Input(tensor.name, sample.signed, minima(mse_curve(sample, bits)[1]))
        format = IntFormat(bits, tensor.quantizer.format.signed)
        found[tensor.name].octav.append(octav(x, format).item())
        found[tensor.name].sweep.append(mse_sweep(x, format).item())

    look_at(model, data, batch_size, batches, solve)
    views: dict[str, list[View]] = {each.name: [] for each in apart_most(list(found.values()))}

    def show(tensor: QuantizedTensor, x: Tensor) -> None:
        if tensor.name in views:
            views[tensor.name].append(view(Sample(tensor.name, x, tensor.quantizer.format.signed), bits))

    look_at(model, data, batch_size, batches, show)  # a second pass: which layers to show is known only now
    return list(found.values()), views


def apart_most(inputs: Sequence[Input]) -> list[Input]:
    """Return the SHOWN inputs where the two methods disagree most, in layer order."""
    chosen = sorted(inputs, key=lambda each: each.ratio, reverse=True)[:SHOWN]
    return [each for each in inputs if each in chosen]


def view(sample: Sample, bits: int) -> View:
    """Return what figure 5 shows of one batch."""
    density, edges = np.histogram(sample.x.float().numpy(), bins=200, density=True)
    s = octav(sample.x, sample.format(bits)).item()
    cost = mse(sample.x, fake_quantize(sample.x, s, sample.format(bits))).item()
    return View(density, edges, *mse_curve(sample, bits), s, cost)


def mse_curve(sample: Sample, bits: int, points: int = 100) -> tuple[list[float], list[float]]:
    """Return the candidates of the MSE sweep (k / points of the maximum) and the measured MSE at each."""
    top = sample.x.abs().max().item()
    candidates = [k / points * top for k in range(1, points + 1)]
    return candidates, [mse(sample.x, fake_quantize(sample.x, s, sample.format(bits))).item() for s in candidates]


def minima(curve: Sequence[float]) -> int:
    """Return how many points of a curve are lower than both neighbours; the first and last point count, too."""
    bounded = [math.inf, *curve, math.inf]
    return sum(a > b < c for a, b, c in zip(bounded, bounded[1:], bounded[2:], strict=False))


def draw(inputs: Sequence[Input], views: dict[str, list[View]], bits: int = 4) -> Figure:
    """Plot (a) the static scalars by layer; (b, c) densities and (d, e) MSE where the methods disagree most."""
    figure = plt.figure(figsize=(12, 11), layout="constrained")
    layout = [["all"] * len(views), *([f"{what}{i}" for i in range(len(views))] for what in ("density", "mse"))]
    axes: dict[str, Axes] = figure.subplot_mosaic(layout)  # type: ignore[arg-type]
    for label, scalars, colour, marker in (
        ("OCTAV", [each.static_octav for each in inputs], CHOSEN, "o"),
        ("MSE sweep", [each.static_sweep for each in inputs], OTHER, "s"),
    ):
        axes["all"].plot(range(len(inputs)), scalars, color=colour, marker=marker, markersize=3, label=label)
    axes["all"].set(yscale="log", xlabel="layer", ylabel="s of the layer input", title=f"Static scalars, {bits} bits")
    axes["all"].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes["all"].legend()
    numbers = {each.name: number for number, each in enumerate(inputs)}
    for i, (name, batches) in enumerate(views.items()):
        density, cost = axes[f"density{i}"], axes[f"mse{i}"]
        for number, batch in enumerate(batches):
            colour = f"C{number % 10}"
            density.stairs(batch.density, batch.edges, color=colour, linewidth=0.8)
            density.axvline(batch.octav, color=colour, linewidth=0.8, linestyle="--")
            cost.plot(batch.candidates, batch.curve, color=colour, linewidth=0.8)
            cost.plot(batch.octav, batch.octav_mse, color=colour, marker="o", markersize=5)
        density.set(yscale="log", xlabel="x", ylabel="density", title=f"layer {numbers[name]}, {name}")
        cost.set(yscale="log", xlabel="s", ylabel="MSE", title=f"one curve per batch, dots: OCTAV, {bits} bits")
    for ax in axes.values():
        ax.grid(alpha=0.3)
    return figure


def table(inputs: Sequence[Input]) -> str:
    """Return the numbers of figure 5 as CSV, with a row for each layer."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("layer", "tensor", "signed", "octav", "sweep", "ratio", "minima_of_mse"))
    for number, each in enumerate(inputs):
        figures = (f"{value:.6g}" for value in (each.static_octav, each.static_sweep, each.ratio))
        writer.writerow((number, each.name, each.signed, *figures, each.minima))
    return out.getvalue()
