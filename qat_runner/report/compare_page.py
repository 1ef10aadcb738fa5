"""The page that compares runs: tables, charts of the metric against bits and cost, and differences of configs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qat_runner.config import policy_label
from qat_runner.config.tasks import Measure
from qat_runner.report import methods, page
from qat_runner.report.differing import differing_keys, keys_that_differ, settings_of, value_in_words
from qat_runner.report.entries import (
    RULES,
    Entry,
    Width,
    by_method,
    by_network,
    entries,
    gaps_of,
    measure_of,
    rules_in_words,
)
from qat_runner.report.page import Chart, PlotlyTrace, View, axes, line, number, rounded
from qat_runner.report.tables import Table, best_head, head, measures
from qat_runner.runs.records import Summary, metric, score, validated
from qat_runner.runs.status import status
from qat_runner.wording import digits, percent

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""Line styles, by bits."""

BESIDE = 0.05
"""Largest distance between the points of two methods, as a fraction of the step between two bit-widths."""

SIDE_BY_SIDE = 0.7
"""Largest distance between the points of the first and the last method, in the same unit."""

Costs = dict[str, tuple[str, Callable[[Summary], float | None]]]

COSTS: Costs = {
    "time": ("minutes", lambda summary: summary["seconds"] / 60),
    "size": ("MB", lambda summary: summary.get("size_mb")),
}
"""Costs that the metric is plotted against: the unit, and a function that reads the cost from summary.json."""


DECIDING = ("model.name", "dataset.name", "mode", "clipping.name", "gradient.name")
"""Keys that decide which other keys apply to a run."""

EFFECTIVE: dict[str, tuple[str, Callable[[float], str]]] = {
    "weight bits": ("mean_weight_bits", "{:.2f}".format),
    "activation bits": ("mean_activation_bits", "{:.2f}".format),
    "quantized %": ("quantized_macs", lambda value: percent(value / 100, 4).removesuffix(" %")),
}
"""Columns about what is quantized: the key in summary.json, and how the value is formatted."""


def write(places: Sequence[Path], out: Path, dataset: str | None = None, model: str | None = None) -> Path:
    """Write the page; return its path.

    Args:
        places, dataset, model: as for `entries`.
        out: the file to write.

    Raises:
        ConfigError: as for `entries`.
    """
    runs, left_out = entries(places, dataset, model, tables=False)
    networks = _drawn(by_network(runs))
    found = methods.standings(runs)
    colours = _colours([run for some in networks.values() for run in some])
    charts = [chart for chart in (_by_bits(networks, colours), _by_cost(networks, colours)) if chart is not None]
    curves = _curves(networks, colours)
    differing, values = _differing(runs)
    content = {
        "title": f"{len(runs)} runs",
        "table": _table(runs),
        "seeds": _over_seeds(methods.table(found)) if any(len(each.values) > 1 for each in found) else None,
        "policies": rules_in_words(runs),
        "left_out": left_out,
        "networks": list(networks),
        "costs": list(COSTS),
        "quality": _quantity(networks).partition(" (")[0],
        "charts": charts,
        "curves": curves,
        "differing": differing,
        "values": values,
    }
    return page.write(out, "compare", [*charts, *([curves] if curves else [])], content)


def _over_seeds(table: Table) -> Table:
    """Drop columns without information: the network if all rows share it, and columns that are empty in all rows."""
    columns = zip(table.headers, zip(*table.cells, strict=True), strict=True)
    kept = [(head, cells) for head, cells in columns if any(cells) and (head != "network" or len({*cells}) > 1)]
    rows = zip(*(cells for _, cells in kept), strict=True)
    return replace(table, headers=[head for head, _ in kept], cells=[[*row] for row in rows])


def _drawn(networks: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Return the networks with more than one run to draw; all networks if none has."""
    return {name: runs for name, runs in networks.items() if len(runs) > 1} or networks


def _colours(runs: Sequence[Entry]) -> dict[str, int]:
    """Return a colour and symbol for each method, the same in all charts, as `page.line` takes it.

    Full precision is grey; if there are several kinds of it, each has a symbol of its own.
    """
    methods = sorted({run.method for run in runs if not run.full_precision})
    full = sorted({run.method for run in runs if run.full_precision})
    grey = {name: page.COLOURS * (i % len(page.SYMBOLS)) + page.COLOURS - 1 for i, name in enumerate(full)}
    free = [index for index in range(page.COLOURS * len(page.SYMBOLS)) if index % page.COLOURS != page.COLOURS - 1]
    return grey | {name: free[i % len(free)] for i, name in enumerate(methods)}


def _quantity(networks: Mapping[str, Sequence[Entry]]) -> str:
    """Return the metric for chart headings; if views differ in it, a general word (each axis names its metric)."""
    titles = dict.fromkeys(measure_of(runs).title for runs in networks.values())
    return next(iter(titles)) if len(titles) == 1 else "Result"


def _y_axis(runs: Sequence[Entry]) -> dict[str, Any]:
    return {"title": {"text": measure_of(runs).head}}


def _table(runs: Sequence[Entry]) -> dict[str, Any]:
    """Return headers, rows (words, numbers as text and value, words again), and the words that all runs share."""
    summaries = [run.summary for run in runs if run.summary is not None]
    drops = gaps_of(runs)
    found = measures(summaries) or [Measure("accuracy")]
    heads = ("bits", head(found), "vs fp32", best_head(found), "SQNR dB", *EFFECTIVE, "MB", "minutes", "seed")
    words = [_words(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    varied = [key for key in words[0] if key in ("method", "run") or len({row[key] for row in words}) > 1]
    before, after = ([key for key in varied if (key in ("mode", "run")) == late] for late in (False, True))
    numbers = [_figures(run, drops.get(run.key)) for run in runs]
    known = [i for i in range(len(heads)) if any(row[i][0] is not None for row in numbers)]
    rows = [
        (
            [texts[key] for key in before],
            [("" if row[i][0] is None else row[i][1](row[i][0]), row[i][0]) for i in known],
            [texts[key] for key in after],
        )
        for texts, row in zip(words, numbers, strict=True)
    ]
    shared = [word for key, word in words[0].items() if key not in varied]
    shown_heads = [heads[i] for i in known]
    effective = any(text in EFFECTIVE for text in shown_heads)
    return {"heads": (before, shown_heads, after), "rows": rows, "shared": shared, "effective": effective}


def _words(run: Entry, name: str) -> dict[str, str]:
    """Return the text cells of a row; the name of an unfinished run includes its state."""
    state = "" if run.summary is not None else f" ({status(run.folder).state})"
    model, dataset = run.network
    return {"model": model, "dataset": dataset, "method": run.method, "mode": run.config.mode, "run": name + state}


def _figures(run: Entry, drop: float | None) -> list[tuple[float | None, Callable[[Any], str]]]:
    """Return the numbers of a row, each with the function that formats it."""
    s: Mapping[str, Any] = run.summary or {}
    return [
        (None if run.bits is None else run.bits.mean, "{:g}".format if run.bits is None else run.bits.text.format),
        (score(s) if s else None, "{:.2f}".format),
        (drop, "{:+.2f}".format),
        (s.get(f"best_{metric(s)}"), "{:.2f}".format),
        (s.get("sqnr_db"), "{:.1f}".format),
        *((None if run.full_precision else s.get(key), layout) for key, layout in EFFECTIVE.values()),
        (s.get("size_mb"), digits),
        (s["seconds"] / 60 if s else None, "{:.1f}".format),
        (run.config.seed, "{:d}".format),
    ]


def _names(runs: Sequence[Entry]) -> list[str]:
    """Return run folder names without their common first words; with the parent folder if names alone repeat."""
    folders = [run.folder.resolve() for run in runs]
    plain = [folder.name for folder in folders]
    if len({*plain}) < len(plain):
        plain = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    names = [name.split("_") for name in plain]
    shared = 0
    while all(len(words) > shared + 1 for words in names) and len({words[shared] for words in names}) == 1:
        shared += 1
    return ["_".join(words[shared:]) for words in names]


def _by_bits(networks: dict[str, list[Entry]], colours: dict[str, int]) -> Chart | None:
    """Return a chart of the metric against bits, a line per method: mean over runs, with their range as a bar."""
    views = []
    for name, runs in networks.items():
        done = [(run, run.bits) for run in runs if run.summary is not None and run.bits is not None]
        widths = sorted({bits for run, bits in done if not run.full_precision} or {bits for _, bits in done})
        methods = by_method(run for run, _ in done)
        beside = min(BESIDE, SIDE_BY_SIDE / max(len(methods), 1))
        shifts = [beside * (i - (len(methods) - 1) / 2) for i in range(len(methods))]  # bars must not overlap
        traces = [
            _mean_line(method, some, widths, shift, colours[method])
            for (method, some), shift in zip(methods, shifts, strict=True)
        ]
        ticks = {"tickvals": list(range(len(widths))), "ticktext": [width.text for width in widths]}
        x_axis = ticks | {"range": [-0.4, len(widths) - 0.6], "zeroline": False}
        views.append(View(name, traces, {"xaxis": x_axis, "yaxis": _y_axis(runs)}))
    heading = f"{_quantity(networks)} against bits"
    return Chart("by-bits", heading, views, axes("bits"), 380, ("network",)) if _any(views) else None


def _mean_line(method: str, runs: Sequence[Entry], widths: Sequence[Width], shift: float, colour: int) -> PlotlyTrace:
    """Return the line of a method; x is the index into `widths`, shifted. Full precision is a horizontal line."""
    unit = measure_of(runs).unit
    if runs[0].full_precision:
        level = statistics.fmean(score(run.summary or {}) for run in runs)
        trace = line(
            [-0.4, len(widths) - 0.6], [level] * 2, method, colour, mode="lines", hovertemplate=f"%{{y}} {unit}"
        )
        return trace | {"line": {"width": 2, "dash": DASHES[1 + colour // page.COLOURS % (len(DASHES) - 1)]}}
    found = {width: [score(run.summary or {}) for run in runs if run.bits == width] for width in widths}
    found = {width: values for width, values in found.items() if values}
    means = {width: statistics.fmean(values) for width, values in found.items()}
    labels = [f"{method}, {width.text} bits" for width in means]
    trace = line([rounded(widths.index(width) + shift) for width in means], list(means.values()), method, colour)
    trace |= {"text": labels, "hovertemplate": f"%{{text}}: %{{y}} {unit}<extra></extra>"}
    if any(len(values) > 1 for values in found.values()):
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [rounded(max(found[width]) - mean) for width, mean in means.items()],
            "arrayminus": [rounded(mean - min(found[width])) for width, mean in means.items()],
            "thickness": 1.5,
            "width": 3,
        }
    return trace


def _by_cost(networks: dict[str, list[Entry]], colours: dict[str, int]) -> Chart | None:
    """Return a chart of the metric against cost, a point per run, with a view for each cost and network."""
    views = []
    for cost, (unit, figure) in COSTS.items():
        for name, runs in networks.items():
            done = [(r, r.summary) for r in runs if r.summary is not None and figure(r.summary) is not None]
            known = {run.folder: (figure(summary), score(summary)) for run, summary in done}
            traces = [_points(method, some, known, colours[method]) for method, some in by_method(r for r, _ in done)]
            title = f"{cost} ({unit})" if traces else f"{cost}: not recorded for these runs"
            views.append(View(name, traces, {"xaxis": {"title": {"text": title}}, "yaxis": _y_axis(runs)}))
    heading = f"{_quantity(networks)} against cost"
    return Chart("by-cost", heading, views, axes(), 380, ("cost", "network")) if _any(views) else None


def _points(method: str, runs: Sequence[Entry], known: dict[Path, tuple[Any, float]], colour: int) -> PlotlyTrace:
    x, y = zip(*(known[run.folder] for run in runs), strict=True)
    labels = [f"{method}, {run.bits_label}, seed {run.config.seed}" for run in runs]
    trace = line([rounded(value) for value in x], y, method, colour, mode="markers", text=labels)
    y_text = f"%{{y}} {measure_of(runs).unit}"
    return trace | {
        "marker": trace["marker"] | {"size": 9},
        "hovertemplate": f"%{{text}}<br>%{{x}}, {y_text}<extra></extra>",
    }


def _curves(networks: dict[str, list[Entry]], colours: dict[str, int]) -> Chart | None:
    """Return a chart of the validation metric by epoch, a line per run: colour for the method, dashes for the bits."""
    views = []
    for name, runs in networks.items():
        widths = sorted({run.bits for run in runs if not run.full_precision and run.bits is not None})
        dashes = {width: DASHES[i % len(DASHES)] for i, width in enumerate(widths)}
        traces: list[PlotlyTrace] = []
        for method, some in by_method(runs):
            found = [
                _curve(run, colours[method], "solid" if run.bits is None else dashes.get(run.bits, "solid"))
                for run in some
            ]
            group: list[PlotlyTrace] = [trace | {"name": method, "legendgroup": method} for trace in found if trace]
            traces += [trace | {"showlegend": i == 0} for i, trace in enumerate(group)]
        key = ", ".join(f"{width.text} {dash}" for width, dash in dashes.items())
        title = f"epoch<br>bits: {key}" if len(widths) > 1 else "epoch"
        few = all(len(trace["x"]) <= page.FEW_EPOCHS for trace in traces)
        views.append(View(name, traces, axes(title, xaxis={"dtick": 1} if few else {}, yaxis=_y_axis(runs))))
    heading = f"{_quantity(networks)} on validation data by epoch"
    return Chart("curves", heading, views, height=420, selects=("network",)) if _any(views) else None


def _curve(run: Entry, colour: int, dash: str) -> PlotlyTrace | None:
    rows = run.epochs
    key = validated(rows[0]) if rows else None
    if key is None:
        return None
    epochs, values = [int(number(row["epoch"])) for row in rows], [number(row[key]) for row in rows]
    label = f"{run.method}, {run.bits_label}, seed {run.config.seed}"
    y_text = f"%{{y}} {measure_of([run]).unit}"
    trace = line(epochs, values, "", colour, hovertemplate=f"{label}<br>epoch %{{x}}: {y_text}<extra></extra>")
    return trace | {"line": {"width": 1.5, "dash": dash}, "marker": trace["marker"] | {"size": 4}}


def _any(views: Sequence[View]) -> bool:
    return any(view.traces for view in views)


def _differing(runs: Sequence[Entry]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the result-deciding keys in which configs differ, and the values of each run.

    A key that only some runs have counts as a difference if the DECIDING keys are equal; otherwise it follows from
    these.
    """
    theirs = [settings_of(run) for run in runs]
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for setting in theirs:
        alike.setdefault(tuple(str(setting.get(key)) for key in DECIDING), []).append(setting)
    differing = {*differing_keys(theirs), *(key for some in alike.values() for key in keys_that_differ(some))}
    keys = [key for key in dict.fromkeys(key for setting in theirs for key in setting) if key in differing]
    labels = [policy_label(run.config) for run in runs]
    values = [
        [(label if key == RULES else value_in_words(setting[key])) if key in setting else "" for key in keys]
        for setting, label in zip(theirs, labels, strict=True)
    ]
    return keys, list(zip(_names(runs), values, strict=True))
