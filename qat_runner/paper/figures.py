"""Figures of results: figure 4 of the paper and the plot of methods; and saving figures as PNG and SVG."""

import logging
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.paper.tables import make_table
from qat_runner.report.entries import Width
from qat_runner.report.methods import Standing
from qat_runner.report.runs import Run
from qat_runner.runs.records import METRICS

log = logging.getLogger("qat_runner")

LINE_STYLES = "--", ":", "-."
"""Lines of full precision, one for each kind of it."""
MARKERS = "osD^v"
"""Markers of methods; each serves ten colours."""

SIDE_BY_SIDE = 0.5
"""Horizontal distance between the first and the last method, as a fraction of the step between two bit-widths."""

LEGEND_COLUMNS, LEGEND_LETTERS = 2, 60
"""Legend of the plot of methods: columns, and characters per line."""

AXIS_REACH = 25.0
"""How many points below the best method an axis reaches."""


def figure4(runs: Sequence[Run], dataset: str, only: str | None = None) -> Figure:
    """Plot validation top1 by epoch for the six rows of Table 1: mean over seeds, with the range shaded.

    The runs are those that the table averages, finished or not. The legend lists rows without a finished epoch as
    missing.

    Args:
        runs: all runs that were found.
        dataset: data set whose runs to plot.
        only: network whose runs to plot; needed if there are runs of several.

    Raises:
        ConfigError: runs belong to several networks, or none has finished an epoch.
    """
    table = make_table("table1", runs, dataset, only)
    models = list(dict.fromkeys(row.model for row in table.rows if row.runs))
    if len(models) > 1:
        raise ConfigError(f"figure4: there are runs of {', '.join(models)}: choose one with --model")
    for warning in table.warnings():
        log.warning(warning)
    figure, axes = grid(1, 1, wide=True)
    ax = axes[0][0]
    missing = []
    for row in table.rows:
        if row.model not in models:
            continue
        curves = [curve for run in row.runs if (curve := _accuracy(run))]
        columns = [[value for value in some if value is not None] for some in zip_longest(*curves)]
        if not columns:
            missing.append(row.label)
            continue
        epochs = range(1, len(columns) + 1)
        (line,) = ax.plot(epochs, [sum(c) / len(c) for c in columns], label=row.label + _ended_early(curves))
        ax.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, color=line.get_color())
    if not ax.lines:
        raise ConfigError(f"figure4: no run of table1 on {dataset} has finished an epoch")
    ax.set(xlabel="epoch", ylabel="validation top1 (%)", title=f"Table 1's runs of {models[0]} on {dataset}")
    ax.legend(title=f"missing: {', '.join(missing)}" if missing else None)
    return figure


def _ended_early(curves: Sequence[Sequence[float]]) -> str:
    """Return a note for the legend if only some of the seeds reach the last epoch."""
    whole = sum(len(curve) == max(map(len, curves)) for curve in curves)
    return "" if whole == len(curves) else f", {whole} of {len(curves)} seeds reach the last epoch"


def _accuracy(run: Run) -> list[float]:
    """Return validation top1 by epoch, in percent; empty, with a warning, if the metrics cannot be read."""
    try:
        return [value for row in METRICS.read(run.folder) if (value := row.get("val_top1")) is not None]
    except UnreadableError as error:
        log.warning(f"{error}: left out")
        return []


def grid(rows: int, columns: int, wide: bool = False) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure and its axes, by row and column."""
    size = (8.0, 5.0) if wide else (4.0 * columns, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure, [list(row) for row in axes]


def methods(found: Sequence[Standing]) -> Figure:
    """Plot the metric that counts against bits, a line per method: mean over seeds, standard deviation as error bar.

    A method far below the others lies outside the axis; an arrow with its mean marks it.

    Args:
        found: standings of at least one network.
    """
    standing = Counter(each.network for each in found)
    networks = [name for name, methods in standing.items() if methods > 1] or list(standing)
    found = [each for each in found if each.network in networks]
    names = sorted({each.method for each in found if not each.full_precision})
    full = sorted({each.method for each in found if each.full_precision})
    lines = -(-(len(names) + 1) // LEGEND_COLUMNS) * (1 + max(map(len, names), default=0) // LEGEND_LETTERS)
    size = max(8.0, 4.5 * len(networks)), 4.5 + 0.16 * lines
    figure, axes = plt.subplots(1, len(networks), figsize=size, layout="constrained", squeeze=False)
    for ax, network in zip(axes[0], networks, strict=True):
        some = [each for each in found if each.network == network]
        widths = sorted({each.bits for each in some if not each.full_precision})
        for number, name in enumerate(names):
            aside = SIDE_BY_SIDE * ((number + 0.5) / len(names) - 0.5)
            style = f"C{number % 10}", MARKERS[number // 10 % len(MARKERS)]
            _draw_method(ax, [each for each in some if each.method == name], widths, aside, *style)
        for each in (each for each in some if each.full_precision):
            dashes = LINE_STYLES[full.index(each.method) % len(LINE_STYLES)]
            ax.axhline(statistics.fmean(each.values.values()), color="black", linestyle=dashes, label=each.method)
        _end_before_outliers(ax, some, widths)
        ax.set(title=network, xlabel="bits", ylabel=some[0].measure.title)
        ax.set_xticks(range(len(widths)), [width.text for width in widths])
        ax.grid(alpha=0.3)
    labelled = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    wrapped = [textwrap.fill(label, LEGEND_LETTERS) for label in labelled]
    figure.legend(labelled.values(), wrapped, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
    return figure


def _draw_method(
    ax: Axes, some: Sequence[Standing], widths: Sequence[Width], aside: float, colour: str, marker: str
) -> None:
    """Draw the line of a method, shifted sideways so that error bars do not overlap."""
    if not some:
        return
    x = [widths.index(each.bits) + aside for each in some]
    values = [list(each.values.values()) for each in some]
    bars = [statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in values]
    order = sorted(range(len(x)), key=x.__getitem__)
    xs, means, reach = zip(*((x[i], statistics.fmean(values[i]), bars[i]) for i in order), strict=True)
    name = some[0].method
    ax.errorbar(xs, means, reach, color=colour, marker=marker, markersize=4, linewidth=0.8, capsize=3, label=name)


def _end_before_outliers(ax: Axes, some: Sequence[Standing], widths: Sequence[Width]) -> None:
    if some[0].measure.lower_is_better or not widths:
        return
    means = {(each.bits, each.method): statistics.fmean(each.values.values()) for each in some}
    end = max(means.values()) - AXIS_REACH
    seen = [mean for mean in means.values() if mean >= end]
    if len(seen) == len(means):
        return
    low = min(seen) - 0.1 * AXIS_REACH
    ax.set_ylim(low, max(seen) + 0.05 * AXIS_REACH)
    for number, width in enumerate(widths):
        out = [f"{method} {mean:.1f}" for (bits, method), mean in means.items() if bits == width and mean < end]
        if out:
            ax.annotate("\n".join([*out, "↓"]), (number, low), ha="center", va="bottom", fontsize=7)


def save(figure: Figure, stem: Path) -> Iterator[Path]:
    """Write stem.png and stem.svg; yield their paths."""
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), dpi=120)
        yield stem.with_suffix(suffix)
    plt.close(figure)
