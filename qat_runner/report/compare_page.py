"""The page that sets runs side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_runner.config import Config, clipping_label, gradient_label, identity, load_config
from qat_runner.config.composing import flat
from qat_runner.errors import ConfigError
from qat_runner.report import page
from qat_runner.report.page import Chart, line, number, rounded
from qat_runner.report.tables import accuracy, against_full_precision
from qat_runner.training.tracking import read_json, read_rows


@dataclass(frozen=True)
class Entry:
    """A run that takes part."""

    folder: Path
    config: Config
    summary: dict[str, Any] | None
    """None while it is not finished"""

    @property
    def method(self) -> str:
        """Clipping and gradient, in a few words."""
        if self.config.policy.full_precision:
            return "full precision"
        own = self.config.clipping.learned or self.config.gradient.name == "mph"
        return clipping_label(self.config) + ("" if own else f" ({gradient_label(self.config)})")


def entries(places: Sequence[Path]) -> list[Entry]:
    """The runs at, or in, the places.

    Raises:
        ConfigError: a place that holds none, or fewer than two in all.
    """
    found: dict[Path, Entry] = {}
    for place in places:
        folders = [place] if (place / "config.yaml").is_file() else [p.parent for p in place.glob("*/config.yaml")]
        runs = [(folder, config) for folder in sorted(folders) if (config := load_config(folder)) is not None]
        if not runs:
            raise ConfigError(f"{place}: holds no run")
        for folder, config in runs:
            path = folder / "summary.json"
            summary = read_json(path) if path.is_file() else None
            found[folder.resolve()] = Entry(folder, config, summary if summary and "metric" in summary else None)
    if len(found) < 2:
        raise ConfigError("compare: needs two runs or more")
    return list(found.values())


def write(places: Sequence[Path], out: Path) -> Path:
    """Write the page; returns its path.

    Args:
        places: run folders, or folders of them.
        out: the file to write.

    Raises:
        ConfigError: as `entries`.
    """
    runs = entries(places)
    done = [run for run in runs if run.summary is not None]
    charts = [c for c in (_by_bits(done), _by_cost(done), _curves(runs)) if c is not None]
    columns, rows = _table(done)
    keys, settings = _differing(runs)
    return page.write(
        out,
        "compare",
        charts,
        title=f"{len(runs)} runs: {', '.join(dict.fromkeys(run.config.dataset.name for run in runs))}",
        heading=f"Comparison of {', '.join(dict.fromkeys(run.config.model.name for run in runs))}",
        columns=columns,
        rows=rows,
        unfinished=", ".join(run.folder.name for run in runs if run.summary is None),
        keys=keys,
        settings=settings,
    )


def _table(runs: Sequence[Entry]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Columns, and rows of cells: text, and what it is sorted by."""
    words = ("model", "dataset", "mode", "method")
    numbers = ("bits", "seed", "accuracy %", "against fp32", "best %", "SQNR dB", "MB", "minutes")
    columns = [{"name": name, "number": False} for name in words] + [{"name": n, "number": True} for n in numbers]
    summaries = [run.summary for run in runs if run.summary is not None]
    rows = []
    for run, s, difference in zip(runs, summaries, against_full_precision(summaries), strict=True):
        figures: list[tuple[float | None, str]] = [
            (_bits(run), "{:g}"),
            (s["seed"], "{:d}"),
            (accuracy(s), "{:.2f}"),
            (difference, "{:+.2f}"),
            (s[f"best_{s['metric']}"], "{:.2f}"),
            (s["sqnr_db"], "{:.1f}"),
            (s.get("size_mb"), "{:.3g}"),
            (s["seconds"] / 60, "{:.1f}"),
        ]
        texts = (s["model"], s["dataset"], s["mode"], run.method)
        rows.append(
            [{"text": text, "sort": text, "number": False} for text in texts]
            + [
                {"text": "" if v is None else form.format(v), "sort": "" if v is None else v, "number": True}
                for v, form in figures
            ]
        )
    return columns, rows


def _bits(run: Entry) -> float:
    """Of weights and activations; their mean where they differ."""
    assert run.config.weight_bits is not None and run.config.activation_bits is not None
    return (run.config.weight_bits + run.config.activation_bits) / 2


def _series(run: Entry, all_runs: Sequence[Entry]) -> str:
    """What a line of a chart is called: the method, and what else tells lines apart."""

    def words(one: Entry) -> tuple[str, str, str]:
        return one.config.model.name, one.config.dataset.name, one.config.mode

    varied = [len({*values}) > 1 for values in zip(*map(words, all_runs), strict=True)]
    return ", ".join([*(word for word, vary in zip(words(run), varied, strict=True) if vary), run.method])


def _by_bits(runs: Sequence[Entry]) -> Chart | None:
    """Accuracy against bits, a line a method; over seeds and the like: the mean, and the range as a bar."""
    groups: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        if run.summary is not None:
            groups.setdefault(_series(run, runs), {}).setdefault(_bits(run), []).append(accuracy(run.summary))
    if not groups:
        return None
    traces = []
    for colour, (name, points) in enumerate(groups.items()):
        bits = sorted(points)
        means = {b: sum(points[b]) / len(points[b]) for b in bits}
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [rounded(max(points[b]) - means[b]) for b in bits],
            "arrayminus": [rounded(means[b] - min(points[b])) for b in bits],
            "visible": any(len(points[b]) > 1 for b in bits),
        }
        traces.append(line([f"{b:g}" for b in bits], [means[b] for b in bits], name, colour, error_y=bars))
    order = [f"{b:g}" for b in sorted({_bits(run) for run in runs})]
    axis = {"type": "category", "categoryorder": "array", "categoryarray": order}
    return page.chart("by-bits", traces, "bits", "accuracy (%)", "Against bits", 400, xaxis=axis)


def _by_cost(runs: Sequence[Entry]) -> Chart | None:
    """Accuracy against training time, or against size."""
    costs = [("training time", "minutes", "seconds", 60.0), ("size of the parameters", "MB", "size_mb", 1.0)]
    options = []
    for label, unit, key, scale in costs:
        known = [run for run in runs if run.summary is not None and run.summary.get(key) is not None]
        groups: dict[str, list[Entry]] = {}
        for run in known:
            groups.setdefault(_series(run, runs), []).append(run)
        traces = [
            line(
                [rounded(run.summary[key] / scale) for run in some if run.summary],
                [accuracy(run.summary) for run in some if run.summary],
                name,
                colour,
                mode="markers",
                marker={"size": 9, "color": page.COLOURS[colour % len(page.COLOURS)]},
                text=[f"{_bits(run):g} bits, seed {run.config.seed}" for run in some],
            )
            for colour, (name, some) in enumerate(groups.items())
        ]
        if traces:
            options.append(
                {"label": label, "traces": traces, "layout": {"xaxis": {"title": {"text": f"{label} ({unit})"}}}}
            )
    if not options:
        return None
    return page.selected("by-cost", options, "cost", "", "accuracy (%)", "Against cost", height=400)


def _curves(runs: Sequence[Entry]) -> Chart | None:
    """Validation accuracy by epoch of every run."""
    traces: list[dict[str, Any]] = []
    for run in runs:
        rows = read_rows(run.folder / "metrics.csv")
        key = next((key for key in (rows[0] if rows else {}) if key in ("val_top1", "val_f1")), None)
        if key is None:
            continue
        bits = "" if run.config.policy.full_precision else f", {_bits(run):g} bits"
        seed = f", seed {run.config.seed}" if len({r.config.seed for r in runs}) > 1 else ""
        values = [number(row[key]) for row in rows]
        name = f"{_series(run, runs)}{bits}{seed}"
        traces.append(line([int(row["epoch"]) for row in rows], values, name, len(traces)))
    if not traces:
        return None
    return page.chart("curves", traces, "epoch", "accuracy (%)", "Validation by epoch", 400)


def _differing(runs: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Keys in which the configs differ, and a row a run: its name and its values."""
    settings = [flat(identity(run.config)) for run in runs]
    keys = sorted({key for setting in settings for key in setting})
    keys = [key for key in keys if len({str(setting.get(key)) for setting in settings}) > 1]
    rows = [
        [run.folder.name, *(_shown(setting.get(key)) for key in keys)]
        for run, setting in zip(runs, settings, strict=True)
    ]
    return keys, rows


def _shown(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
