"""The page of a run: what came of it, how, and how to have it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qat_runner.config import Config, load_config
from qat_runner.config.composing import choices, command, compose_config, defaults_for, flat
from qat_runner.config.identities import PLACES, differences
from qat_runner.config.resolving import from_hydra
from qat_runner.errors import ConfigError
from qat_runner.report import page
from qat_runner.report.page import Chart, line, number, rounded
from qat_runner.report.plots import CHOSEN, OTHER
from qat_runner.report.runs import find_runs
from qat_runner.report.status import status
from qat_runner.report.tables import accuracy, against_full_precision
from qat_runner.training.tracking import read_json, read_rows

POINTS = 1000
"""Steps that the curve of the loss is drawn through, at most; each is the mean of those that it stands for."""

LEVELS = 64
"""Levels of a grid that are drawn, at most."""


def write(folder: Path, out: Path) -> Path:
    """Write the page of a run, finished or not; returns its path.

    Args:
        folder: of the run.
        out: the file to write.

    Raises:
        ConfigError: the folder holds no run.
    """
    config = load_config(folder)
    if config is None:
        raise ConfigError(f"{folder}: holds no run")
    now = status(folder)
    noise = _noise(folder)
    scalars, histograms = _scalars(folder), _histograms(folder)
    curves = _curves(folder)
    found = [*curves, *noise["charts"], *([scalars] if scalars else []), *([histograms] if histograms else [])]
    environment = _read(folder / "environment.json") or {}
    exported = _read(folder / "export" / "export.json")
    return page.write(
        out,
        "run",
        found,
        title=folder.resolve().name,
        heading=_heading(config),
        state=now.state,
        why=now.note,
        headline=_headline(folder, config),
        curves=curves,
        noise=noise["charts"],
        noise_epoch=noise["epoch"],
        noisiest=noise["noisiest"],
        scalars=scalars,
        histograms=histograms,
        exported=_exported(exported),
        command=command(config),
        recorded=" ".join(environment.get("command", ["unknown"])),
        directory=environment.get("directory", "an unknown folder"),
        choices=" ".join(choices(config)),
        config=_config(config),
        environment=_environment(environment),
    )


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _heading(config: Config) -> str:
    if config.policy.full_precision:
        how = "in full precision"
    else:
        same = config.weight_bits == config.activation_bits
        bits = f"{config.weight_bits}" if same else f"{config.weight_bits}/{config.activation_bits}"
        how = f"at {bits} bits"
    return f"{config.model.name} on {config.dataset.name} {how}"


def _headline(folder: Path, config: Config) -> list[tuple[str, str]]:
    """Figures and what they are."""
    summary = _read(folder / "summary.json")
    if summary is None or "metric" not in summary:
        rows = read_rows(folder / "metrics.csv")
        return [(f"{len(rows)}/{config.epochs}", "epochs so far")] if config.training else []
    metric = summary["metric"]
    cards = [(f"{accuracy(summary):.2f} %", metric)]
    if config.training:
        cards.append((f"{summary[f'best_{metric}']:.2f} %", f"best {metric}"))
    difference = _difference(folder, summary)
    if difference is not None:
        cards.append((f"{difference:+.2f}", "against full precision"))
    if summary["sqnr_db"] is not None:
        cards.append((f"{summary['sqnr_db']:.1f} dB", "mean SQNR"))
    if not config.policy.full_precision:
        cards += [(summary["clipping"], "clipping"), (summary["gradient"], "gradient")]
    if "size_mb" in summary:
        ratio = summary["fp32_size_mb"] / summary["size_mb"]
        smaller = "of parameters" if ratio == 1 else f"of parameters, {ratio:.1f} times less"
        cards.append((f"{summary['size_mb']:.3g} MB", smaller))
    cards.append((_duration(summary["seconds"]), f"{summary['epochs']} epochs" if config.training else "validation"))
    return cards


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _difference(folder: Path, summary: Mapping[str, Any]) -> float | None:
    """From the full-precision run that lies in the same folder of runs, in points."""
    beside = [run.summary for run in find_runs(folder.resolve().parent) if run.summary and "metric" in run.summary]
    return against_full_precision([*beside, summary])[-1]


def _curves(folder: Path) -> list[Chart]:
    """Loss by step, and accuracy and loss by epoch."""
    rows, steps = read_rows(folder / "metrics.csv"), read_rows(folder / "steps.csv")
    if not rows and not steps:
        return []
    charts = []
    if rows:
        halves = [key for key in rows[0] if key.startswith(("train_", "val_"))]
        losses = [key for key in halves if key.endswith("_loss")]
        rates = [key for key in halves if key not in losses and not key.endswith("5")]
        epochs = [int(row["epoch"]) for row in rows]
        ticks = {"dtick": 1} if len(rows) <= 12 else {}
        for name, heading, keys, unit in (("rates", "Accuracy", rates, "%"), ("losses", "Loss", losses, "")):
            traces = [
                line(epochs, [number(row[key]) for row in rows], key.replace("_", " "), int(key.startswith("train")))
                for key in keys
            ]
            charts.append(page.chart(name, traces, "epoch", unit, heading, xaxis=ticks))
    if steps:
        values = [number(row["loss"]) for row in steps]
        size = -(-len(values) // POINTS)
        means = [sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])]
        label = "loss" if size == 1 else f"mean loss of {size} steps"
        trace = line([size * (i + 1) for i in range(len(means))], means, label, mode="lines", showlegend=False)
        charts.append(page.chart("steps", [trace], "step", "", "Training loss by step"))
        rate = line(
            [size * (i + 1) for i in range(len(means))],
            [number(row["lr"]) for row in steps[::size]],
            "learning rate",
            1,
            mode="lines",
            showlegend=False,
        )
        charts.append(page.chart("lr", [rate], "step", "", "Learning rate"))
    return charts


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['layer']}.{row['tensor']}"


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 2 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return {name: ".".join(p[shared:]) for name, p in zip(names, parts, strict=True)}


def _noise(folder: Path) -> dict[str, Any]:
    """Charts of the latest noise, weights and activations apart; its epoch; the three noisiest tensors."""
    rows = read_rows(folder / "layers.csv")
    if not rows:
        return {"charts": [], "epoch": None, "noisiest": ""}
    epoch = rows[-1]["epoch"]
    rows = [row for row in rows if row["epoch"] == epoch]
    noisiest = sorted(rows, key=lambda row: number(row["sqnr_db"]))[:3]
    charts = []
    for heading, weights in (("Weights", True), ("Activations", False)):
        some = [row for row in rows if (row["tensor"] == "weight") == weights]
        if not some:
            continue
        short = _short([_label(row) for row in some])
        labels = [short[_label(row)] for row in some]
        told = [[row["bits"], f"{100 * number(row['clipped_fraction']):.2g} %"] for row in some]
        hover = "%{y}: %{x:.1f} dB, %{customdata[0]} bits, %{customdata[1]} clipped"
        traces = [
            {
                "type": "scatter",
                "mode": "markers",
                "x": [rounded(number(row[key])) for row in some],
                "y": labels,
                "name": name,
                "marker": {"color": colour, "symbol": symbol, "size": 8},
                "customdata": told,
                "hovertemplate": hover if key == "sqnr_db" else "%{y}: %{x:.1f} dB",
            }
            for key, name, colour, symbol in (
                ("max_sqnr_db", "max-scaling", OTHER, "square-open"),
                ("sqnr_db", "this run", CHOSEN, "circle"),
            )
        ]
        ticks = {"tickfont": {"size": 10}, "autorange": "reversed", "dtick": 1, "title": {"text": ""}}
        name = "noise-weights" if weights else "noise-activations"
        charts.append(page.chart(name, traces, "SQNR (dB)", "", heading, 110 + 17 * len(some), yaxis=ticks))
    worst = ", ".join(f"{_name(row)} ({number(row['sqnr_db']):.1f} dB)" for row in noisiest)
    return {"charts": charts, "epoch": epoch, "noisiest": worst}


def _label(row: Mapping[str, str]) -> str:
    return row["layer"] if row["tensor"] in ("weight", "input") else _name(row)


def _scalars(folder: Path) -> Chart | None:
    """Clipping scalars by epoch, a tensor at a time."""
    by_tensor: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(folder / "layers.csv"):
        by_tensor.setdefault(_name(row), []).append(row)
    if not any(len(rows) > 1 for rows in by_tensor.values()):
        return None
    options = [
        {
            "label": name,
            "traces": [line([int(r["epoch"]) for r in rows], [number(r["s"]) for r in rows], name, showlegend=False)],
        }
        for name, rows in by_tensor.items()
    ]
    return page.selected(
        "scalars", options, "tensor", "epoch (0: before training)", "s", yaxis={"rangemode": "tozero"}, height=280
    )


def _histograms(folder: Path) -> Chart | None:
    """Distributions in units of the clipping scalar, a tensor at a time."""
    found = _read(folder / "histograms.json")
    if not found:
        return None
    return page.selected(
        "histograms", [_histogram(h) for h in found], "tensor", "x / s", "count", log=True, bargap=0, height=360
    )


def _histogram(h: Mapping[str, Any]) -> dict[str, Any]:
    width = (h["high"] - h["low"]) / len(h["counts"])
    bars = {
        "type": "bar",
        "x": [rounded(h["low"] + (i + 0.5) * width) for i in range(len(h["counts"]))],
        "y": [n or None for n in h["counts"]],
        "width": width,
        "marker": {"color": CHOSEN},
        "name": "count",
        "hovertemplate": "x / s = %{x}: %{y}<extra></extra>",
    }
    levels = 2 ** h["bits"]
    per_scalar = levels // 2 if h["signed"] else levels
    codes = range(-per_scalar if h["signed"] else 0, per_scalar)
    grid = [code / per_scalar for code in codes] if levels <= LEVELS else []
    ends = [-1, 1] if h["signed"] else [1]
    lines = [_mark(x, 0, 1, OTHER, 2) for x in ends] + [_mark(x, -0.035, 0, OTHER, 1) for x in grid]
    per = ", s the mean over channels" if h["granularity"] == "channel" else ""
    sign = "signed" if h["signed"] else "unsigned"
    title = {"text": f"x / s, with s = {h['s']:.4g}{per}; {h['bits']} bits, {sign}"}
    axis = {"title": title, "range": [min(h["low"], -1.05 if h["signed"] else -0.05), max(h["high"], 1.05)]}
    return {"label": _name(h), "traces": [bars], "layout": {"shapes": lines, "xaxis": axis}}


def _mark(x: float, y0: float, y1: float, colour: str, width: int) -> dict[str, Any]:
    """A vertical line, its ends in parts of the plot's height."""
    style = {"color": colour, "width": width}
    return {"type": "line", "x0": x, "x1": x, "y0": y0, "y1": y1, "yref": "paper", "line": style}


def _exported(result: Mapping[str, Any] | None) -> str | None:
    from qat_runner.export.exporting import text  # only where there is something: it imports much

    return None if result is None else text(dict(result))


def _config(config: Config) -> list[dict[str, Any]]:
    """Rows of the config table: groups last to first level, marked where they are not the defaults."""
    default = flat(asdict(defaults_for(config)))
    plain = flat(asdict(from_hydra(compose_config([]))))
    own = flat(asdict(replace(config, fingerprints={}, sweep={}, standins={})))
    chosen = ("model.name", "dataset.name", "clipping.name", "clipping.dynamic", "gradient.name", "bits", "mode")
    rows = []
    for key, value in sorted(own.items(), key=lambda item: ("." in item[0], item[0])):
        if key in ("sweep", "standins", "fingerprints"):
            continue
        base = plain if key in chosen or key == "weights" else default
        changed = key.partition(".")[0] not in PLACES and base.get(key) != value
        rows.append({"key": key, "value": _shown(value), "default": _shown(base.get(key)), "changed": changed})
    return rows


def _shown(value: Any) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, bool | list) else str(value)


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was made in, line by line."""
    if not environment:
        return [("environment", "not on record")]
    machine, git = environment["machine"], environment.get("git")
    lines = [
        ("started", environment["started"]),
        ("command", " ".join(environment["command"])),
        ("git", "not a checkout" if git is None else f"{git['commit']}{', with changes' if git['dirty'] else ''}"),
        ("python", environment["python"]),
        *((name, str(version)) for name, version in environment["packages"].items() if version),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}"),
        ("GPUs", ", ".join(machine["gpus"]) or "none"),
        ("threads", str(machine["torch_threads"])),
        ("processes", str(environment.get("processes", 1))),
    ]
    for sitting in environment.get("resumed", []):
        changed = differences(environment["packages"], sitting["packages"])
        lines.append(("went on", sitting["started"] + (f", with another {', '.join(changed)}" if changed else "")))
    return lines
