"""Charts of weights that oscillate between two codes: all weights by epoch, and each layer in the latest epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from qat_runner.report.page import CHOSEN, OTHER, Chart, PlotlyTrace, View, axes, line, rounded
from qat_runner.report.tensor_charts import labels, latest

KEYS = {"oscillating": CHOSEN, "frozen": OTHER}
"""Columns of oscillations.csv that are drawn, and their colours."""

Row = Mapping[str, Any]
"""A row of oscillations.csv."""


def oscillation_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts; empty if no oscillations were recorded."""
    if not rows:
        return []
    epochs = sorted({row["epoch"] for row in rows})
    frozen = any(row["frozen"] for row in rows)
    keys = [key for key in KEYS if key == "oscillating" or frozen]
    lines = [line(epochs, [_of_all(rows, epoch, key) for epoch in epochs], key, KEYS[key]) for key in keys]
    last = [{**row, "tensor": "weight"} for row in latest(rows)]
    places = list(range(len(last)))
    axis = {"tickvals": places, "ticktext": labels(last), "range": [len(last) - 0.4, -0.6], "zeroline": False}
    layers = View("", [_points(last, key) for key in keys], {"yaxis": axis | {"tickfont": {"size": 10}}})
    layout = axes("% of the elements", xaxis={"rangemode": "tozero"})
    return [
        Chart("oscillations-all", "All weights by epoch", [View("", lines)], axes("epoch", "%", hovermode="x unified")),
        Chart("oscillations-layers", "By layer, latest epoch", [layers], layout, 80 + 17 * len(last)),
    ]


def _of_all(rows: Sequence[Row], epoch: int, key: str) -> float:
    some = [row for row in rows if row["epoch"] == epoch]
    return float(sum(row[key] * row["elements"] for row in some) / max(sum(row["elements"] for row in some), 1))


def _points(rows: Sequence[Row], key: str) -> PlotlyTrace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [rounded(row[key]) for row in rows],
        "y": list(range(len(rows))),
        "text": [f"{row['layer']}, {row['elements']} elements" for row in rows],
        "hovertemplate": "%{text}<br>%{x:.3g} %",
        "name": key,
        "colour": KEYS[key],
        "marker": {"size": 8},
    }
