"""The plots in a run folder, drawn from its CSV files and from the record of the bit allocation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qat_runner.config.tasks import TaskFacts
from qat_runner.runs.files import write_whole
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import LAYERS, METRICS, AllocationRecord, Point, cost_of

CHOSEN, OTHER = "#2a6fbb", "#d9822b"


def plot_curves(folder: Path, task: TaskFacts) -> None:
    """Draw curves.png: loss and the task's metrics against the epoch, from metrics.csv, if any epoch was trained.

    Args:
        folder: folder of a run.
        task: facts about the task of the run.
    """
    rows = METRICS.read(folder)
    if not rows:
        return
    epochs = [row["epoch"] for row in rows]
    splits = [key for key in rows[0] if key.startswith(("train_", "val_"))]
    losses = [key for key in splits if key.endswith("_loss")]
    rates = [key for key in splits if key not in losses and key.partition("_")[2] not in task.not_drawn]
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, keys, label in zip(both, (losses, rates), ("loss", task.measure.title.lower()), strict=True):
        for key in keys:
            split, _, what = key.partition("_")
            colour = OTHER if split == "train" else CHOSEN
            style = "--" if what in task.dashed else "-"
            values = [math.nan if (value := row.get(key)) is None else value for row in rows]
            axes.plot(epochs, values, style, color=colour, marker="o", markersize=3, label=f"{split} {what}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(folder.name)
    _save(figure, RunFolder(folder).curves)


def plot_bits(folder: Path, record: AllocationRecord) -> None:
    """Draw bits.png: the Pareto front beside uniform bit-widths, and the bit-width of each weight and activation."""
    figure, (front, bits) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for key, colour, label in (("front", CHOSEN, "best"), ("uniform", OTHER, "uniform")):
        points: Sequence[Point] = record[key]  # type: ignore[literal-required]
        front.plot([cost_of(record, p) for p in points], [p["rise"] for p in points], "o-", color=colour, label=label)
    front.plot(
        cost_of(record, record["chosen"]), record["chosen"]["rise"], "*", color="black", markersize=14, label="chosen"
    )
    front.set(xlabel=" or ".join(record["figures"]), ylabel=f"price ({record['price']})")
    if all(p["rise"] > 0 for p in (*record["front"], *record["uniform"])):
        front.set_yscale("log")
    for weights, colour, label in ((True, CHOSEN, "weights"), (False, OTHER, "activations")):
        widths = [t["bits"] for t in record["tensors"] if (t["tensor"] == "weight") == weights]
        bits.step(range(len(widths)), widths, where="mid", color=colour, label=label)
    bits.set(xlabel="layer, in order", ylabel="bits", ylim=(0, None))
    bits.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (front, bits):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(record["answer"], fontsize=9, wrap=True)
    _save(figure, RunFolder(folder).bits)


def plot_noise(folder: Path) -> None:
    """Draw noise.png: the SQNR of each tensor in the latest epoch of layers.csv, beside that of max-scaling."""
    rows = LAYERS.read(folder)
    if not rows:
        return
    rows = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    width = max(8.0, 0.22 * len(rows) / 2 + 2)
    figure, axes = plt.subplots(2, 1, figsize=(width, 8), layout="constrained")
    for ax, weights in zip(axes, (True, False), strict=True):
        _noise_of([row for row in rows if (row["tensor"] == "weight") == weights], ax)
        ax.set_title("weights" if weights else "activations")
    figure.suptitle(f"{folder.name}: SQNR after epoch {rows[-1]['epoch']}")
    _save(figure, RunFolder(folder).noise)


def _noise_of(rows: Sequence[Mapping[str, Any]], ax: Axes) -> None:
    places = range(len(rows))
    for key, label, colour, marker in (
        ("max_sqnr_db", "max-scaling", OTHER, "s"),
        ("sqnr_db", "this run", CHOSEN, "o"),
    ):
        values = [row[key] for row in rows]
        ax.plot(
            places,
            [math.nan if v is None or math.isinf(v) else v for v in values],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=label,
        )
    ax.set_xticks(places, [f"{_name(row)} ({row['bits']} b)" for row in rows], rotation=90, fontsize=7)
    ax.set(ylabel="SQNR (dB)")
    ax.grid(alpha=0.3)
    ax.legend()


def _name(row: Mapping[str, Any]) -> str:
    return row["layer"] if row["tensor"] in ("weight", "input") else f"{row['layer']}.{row['tensor']}"


def _save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
