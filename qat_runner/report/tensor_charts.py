"""Charts of a run's tensors: the noise of all tensors, and the values and clipping scalar of a selected one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qat_runner.quant import IntFormat
from qat_runner.report.page import CHOSEN, OTHER, Chart, PlotlyTrace, View, axes, line, number, rounded
from qat_runner.runs.records import LEVELS
from qat_runner.wording import percent

FEW = 20
"""Number of tensors shown at first if there are many more."""

LETTERS = 27
"""Largest number of characters of a tensor's name beside an axis."""

Row = Mapping[str, Any]
"""A row of layers.csv, or an entry of histograms.json."""


def name(row: Row) -> str:
    """Return the name of a tensor."""
    return f"{row['layer']}.{row['tensor']}"


def latest(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the latest epoch."""
    return [row for row in rows if row["epoch"] == rows[-1]["epoch"]]


def quiet(row: Row | None) -> float:
    """Return the sort key that puts the noisiest first: SQNR in dB, or infinity if it is not recorded."""
    sqnr = math.nan if row is None else number(row["sqnr_db"])
    return math.inf if math.isnan(sqnr) else sqnr


def noisiest(rows: Sequence[Row], count: int = 3) -> list[tuple[str, str]]:
    """Return the tensors with the lowest SQNR in the latest epoch, and that SQNR; tensors without one are left out."""
    found = [row for row in sorted(latest(rows), key=quiet)[:count] if quiet(row) < math.inf]
    return [(name(row), f"{quiet(row):.1f} dB") for row in found]


def noise_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return charts of the latest SQNR beside that of max-scaling, one for weights and one for activations."""
    charts = []
    for kind in ("weights", "activations"):
        some = [row for row in latest(rows) if (row["tensor"] == "weight") == (kind == "weights")]
        if some:
            views = [_noise(f"all {len(some)}, in network order", some)]
            if len(some) > FEW + 5:
                first = sorted(some, key=quiet)[:FEW]
                views.insert(0, _noise(f"the {FEW} noisiest", first))
            selects = (f"{kind}-shown",) if len(views) > 1 else ()
            charts.append(Chart(f"noise-{kind}", kind.capitalize(), views, axes("SQNR (dB)"), selects=selects))
    return charts


def _noise(label: str, rows: Sequence[Row]) -> View:
    """Return a view with a line per tensor: a dot for this run, a square for max-scaling, and a bar between them."""
    places = list(range(len(rows)))
    chosen, other = ([rounded(number(row[key])) for row in rows] for key in ("sqnr_db", "max_sqnr_db"))
    gain = [None if a is None or b is None else rounded(a - b) for a, b in zip(chosen, other, strict=True)]
    hover = [f"{name(row)}, {row['bits']} bits, {percent(number(row['clipped_fraction']))} clipped" for row in rows]
    common: PlotlyTrace = {"type": "scatter", "mode": "markers", "y": places, "text": hover}
    common["hovertemplate"] = "%{text}<br>%{x:.1f} dB"
    symbol = {"size": 7, "symbol": "square-open"}
    link = {
        "type": "data",
        "symmetric": False,
        "array": gain,
        "arrayminus": [0] * len(rows),
        "width": 0,
        "thickness": 1,
    }
    traces = [
        common | {"x": other, "name": "max-scaling", "colour": OTHER, "marker": symbol, "error_x": link},
        common | {"x": chosen, "name": "this run", "colour": CHOSEN, "marker": {"size": 8}},
    ]
    ends = [len(rows) - 0.4, -0.6]
    ticks = {"tickvals": places, "ticktext": labels(rows), "range": ends, "zeroline": False, "tickfont": {"size": 10}}
    return View(label, traces, {"yaxis": ticks}, 80 + 17 * len(rows))


def labels(rows: Sequence[Row]) -> list[str]:
    """Return names that fit beside an axis: without the common prefix, and shortened in the middle if too long."""
    layers = [row["layer"].split(".") for row in rows]
    shared = 0
    while all(len(parts) > shared + 1 for parts in layers) and len({parts[shared] for parts in layers}) == 1:
        shared += 1
    plain = ("weight", "input")
    names = [
        ".".join([*parts[shared:], *([] if row["tensor"] in plain else [row["tensor"]])])
        for parts, row in zip(layers, rows, strict=True)
    ]
    return [
        text if len(text) <= LETTERS else f"{text[: LETTERS // 3]}…{text[1 - LETTERS * 2 // 3 :]}" for text in names
    ]


def tensor_charts(rows: Sequence[Row], histograms: Sequence[Row]) -> list[Chart]:
    """Return two charts that share a selector (noisiest first): a tensor's values and its clipping scalar by epoch.

    Args:
        rows: rows of layers.csv.
        histograms: entries of histograms.json; may be empty.
    """
    by_name = {name(h): h for h in histograms}
    history: dict[str, list[Row]] = {}
    for row in rows:
        history.setdefault(name(row), []).append(row)
    now = {name(row): row for row in latest(rows)}
    names = sorted({**by_name, **history}, key=lambda tensor: quiet(now.get(tensor)))
    charts = []
    if by_name:
        layout = axes(bargap=0, showlegend=False)
        views = [_histogram(tensor, by_name.get(tensor)) for tensor in names]
        charts.append(Chart("histogram", "Values", views, layout, 320, ("tensor",), "logarithmic"))
    if any(len(some) > 1 for some in history.values()):
        layout = axes("epoch", yaxis={"rangemode": "tozero"}, showlegend=False)
        views = [_scalar(tensor, history.get(tensor, [])) for tensor in names]
        charts.append(Chart("scalar", "Clipping scalar s by epoch", views, layout, 320, ("tensor",)))
    return charts


def _scalar(tensor: str, rows: Sequence[Row]) -> View:
    epochs, values = [row["epoch"] for row in rows], [number(row["s"]) for row in rows]
    per = f" (mean over {rows[0]['granularity']}s)" if rows and rows[0]["granularity"] != "tensor" else ""
    return View(tensor, [line(epochs, values, "s")], {"yaxis": {"title": {"text": f"s{per}"}}})


def _histogram(tensor: str, h: Row | None) -> View:
    """Return a histogram with lines at the clipping bounds and ticks at the levels; x is in units of the scalar."""
    if h is None:
        return View(tensor, [], {"xaxis": {"title": {"text": "not recorded"}}})
    width = (h["high"] - h["low"]) / len(h["counts"])
    bars: PlotlyTrace = {
        "type": "bar",
        "x0": rounded(h["low"] + width / 2),
        "dx": rounded(width),
        "width": width,
        "y": h["counts"],
        "colour": CHOSEN,
        "marker": {"line": {"width": 0}},
        "hovertemplate": "%{x:.3f} s: %{y}<extra></extra>",
    }
    shapes = [_mark(level, -0.04, 0, 1) for level in _levels(h)]
    shapes += [_mark(end, 0, 1, 2) for end in h.get("ends", (-1, 1) if h["signed"] else (1,))]
    start = min(h["low"], -1.05 if h["signed"] else -0.05)
    axis = {"title": {"text": _describe(h)}, "range": [start, max(h["high"], 1.05)], "zeroline": False}
    axis |= {"ticks": "outside", "ticklen": 14, "tickcolor": "rgba(0,0,0,0)"}  # room for the ticks of the levels
    return View(tensor, [bars], {"shapes": shapes, "xaxis": axis})


def _levels(h: Row) -> Sequence[float]:
    """Return the recorded levels; runs from before levels were recorded used the paper's integers."""
    if "levels" in h:
        levels: list[float] = h["levels"]
        return levels
    return IntFormat(h["bits"], h["signed"]).levels if 2 ** h["bits"] <= LEVELS else []


def _mark(x: float, bottom: float, top: float, width: int) -> dict[str, Any]:
    """Return a vertical line; bottom and top are fractions of the plot's height."""
    ends = {"x0": x, "x1": x, "y0": bottom, "y1": top, "yref": "paper"}
    return {"type": "line", **ends, "colour": OTHER, "line": {"width": width}}


def _describe(h: Row) -> str:
    """Return the title of the x axis, with the share of values beyond it."""
    per = "= " if h["granularity"] == "tensor" else f"per {h['granularity']}, mean "
    grid = f"{h['bits']} bits, {'signed' if h['signed'] else 'unsigned'}"
    share = h["beyond"] / max(h["beyond"] + sum(h["counts"]), 1)
    far = max(-h["lowest"], h["highest"])
    beyond = f"<br>{percent(share)} of the values lie outside, up to {far:.3g} s" if h["beyond"] else ""
    return f"x / s, s {per}{h['s']:.3g}<br>{grid}{beyond}"
