"""Charts of a bit allocation: the Pareto front, the bits of every tensor, and the prices that decided them."""

from collections.abc import Sequence
from typing import Any

from qat_runner.report.page import CHOSEN, OTHER, Chart, PlotlyTrace, View, axes, line, rounded
from qat_runner.report.tensor_charts import labels
from qat_runner.runs.records import AllocationRecord, Point, PricedTensor, cost_of

PRICES = {
    "gradient": "predicted loss increase",
    "measured": "sum of loss increases, each tensor quantized alone",
    "noise": "sum of noise-to-signal ratios",
}
"""Kind of price -> axis label of the sum of prices."""
SENSITIVITY = {**dict.fromkeys(("gradient", "measured"), "loss increase (nats)"), "noise": "noise-to-signal ratio"}
"""Kind of price -> axis label of the price of one tensor."""


def allocation_charts(record: AllocationRecord) -> list[Chart]:
    """Return charts of the front beside uniform bits, of the measured metric, and of the bits and price of each tensor.

    Weights and activations have separate charts.
    """
    charts = [_front(record), _measured(record)]
    for kind in ("weights", "activations"):
        some = [t for t in record["tensors"] if (t["tensor"] == "weight") == (kind == "weights")]
        if some:
            charts += [_bits(kind, some), _prices(kind, some, record)]
    return charts


def _front(record: AllocationRecord) -> Chart:
    def drawn(points: Sequence[Point], name: str, colour: int, **more: Any) -> PlotlyTrace:
        return line([rounded(cost_of(record, p)) for p in points], [p["rise"] for p in points], name, colour, **more)

    curve, alike = drawn(record["front"], "front", CHOSEN), drawn(record["uniform"], "uniform", OTHER)
    alike |= {"mode": "lines+markers+text", "text": [f"{p.get('width')} bits" for p in record["uniform"]]}
    alike["textposition"] = [*["top right"] * (len(record["uniform"]) - 1), "top left"]  # within the chart
    chosen = drawn([record["chosen"]], "chosen", 2, mode="markers")
    chosen["marker"] = {"size": 13, "symbol": "star"}
    positive = all(p["rise"] > 0 for p in (*record["front"], *record["uniform"]))
    axis = {"type": "log", "exponentformat": "power"} if positive else {}
    layout = axes(" or ".join(record["figures"]), PRICES[record["price"]], yaxis=axis)
    return Chart("front", "Pareto front and uniform bits", [View("", [curve, alike, chosen])], layout, 380)


def _measured(record: AllocationRecord) -> Chart:
    """Return a chart of the metric against the cost, for the networks that were measured during the search."""

    def drawn(points: Sequence[Point], name: str, colour: int) -> PlotlyTrace:
        known = sorted((cost_of(record, p), p["value"]) for p in points if p["value"] is not None)
        return line([rounded(cost) for cost, _ in known], [value for _, value in known], name, colour)

    best = drawn(record.get("measured") or [record["chosen"]], "chosen bits", CHOSEN)
    alike = drawn(record["uniform"], "uniform", OTHER)
    costs = [*best["x"], *alike["x"]]
    full = line([min(costs), max(costs)], [record["reference"]] * 2, "full precision", 2, mode="lines")
    full["line"] = {"width": 1.5, "dash": "dash"}
    chosen = drawn([record["chosen"]], "result", 3) | {"mode": "markers"}
    chosen["marker"] = {"size": 13, "symbol": "star"}
    layout = axes(" or ".join(record["figures"]), record["metric"])
    return Chart("measured", "Measured networks", [View("", [best, alike, full, chosen])], layout, 380)


def _bits(kind: str, tensors: Sequence[PricedTensor]) -> Chart:
    bars: PlotlyTrace = {
        "type": "bar",
        "orientation": "h",
        "x": [t["bits"] for t in tensors],
        "y": list(range(len(tensors))),
        "colour": CHOSEN,
        "text": [f"{t['layer']}.{t['tensor']}, {t['elements']} elements" for t in tensors],
        "textposition": "none",
        "hovertemplate": "%{text}<br>%{x} bits<extra></extra>",
    }
    layout = axes("bits", yaxis=_names(tensors), showlegend=False, bargap=0.3)
    return Chart(f"bits-{kind}", f"Bits of {kind}", [View("", [bars])], layout, _height(tensors))


def _prices(kind: str, tensors: Sequence[PricedTensor], record: AllocationRecord) -> Chart:
    """Return a chart of the price of each tensor, with a view per bit-width; those with a second kind come first."""
    widths = sorted(
        dict.fromkeys(width for t in tensors for width in t["price"]),
        key=lambda width: (not any(width in t["beside"] for t in tensors), int(width)),
    )
    views = [view for width in widths for view in _at_width(tensors, width, record)]
    selects = (f"prices-{kind}-width",) if len(views) > 1 else ()
    layout = axes(yaxis=_names(tensors))
    return Chart(f"prices-{kind}", f"Prices of {kind}", views or [View("", [])], layout, _height(tensors), selects)


def _at_width(tensors: Sequence[PricedTensor], width: str, record: AllocationRecord) -> list[View]:
    """Return the view of a bit-width, or two views if the second kind of price has another unit."""
    places = list(range(len(tensors)))
    common: PlotlyTrace = {"type": "scatter", "mode": "markers", "y": places}
    common["text"] = [f"{t['layer']}.{t['tensor']}" for t in tensors]
    common["hovertemplate"] = "%{text}<br>%{x}"
    prices = [rounded(t["price"].get(width)) for t in tensors]
    price = common | {"x": prices, "name": record["price"], "colour": CHOSEN, "marker": {"size": 8}}
    if not any(width in t["beside"] for t in tensors):
        return [View(f"{width} bits", [price], _axis([price], record["price"]))]
    others = [rounded(t["beside"].get(width)) for t in tensors]
    symbol = {"size": 7, "symbol": "square-open"}
    other = common | {"x": others, "name": record["beside"], "colour": OTHER, "marker": symbol}
    if SENSITIVITY[record["price"]] == SENSITIVITY[record["beside"]]:
        return [View(f"{width} bits", [other, price], _axis([other, price], record["price"]))]
    kinds = (price, record["price"]), (other, record["beside"])
    return [View(f"{width} bits, {kind}", [trace], _axis([trace], kind)) for trace, kind in kinds]


def _axis(traces: Sequence[PlotlyTrace], kind: str) -> dict[str, Any]:
    positive = all(x is None or x > 0 for trace in traces for x in trace["x"])
    return {"xaxis": {"type": "log" if positive else "linear", "title": {"text": SENSITIVITY[kind]}}}


def _height(tensors: Sequence[PricedTensor]) -> int:
    return 80 + 17 * len(tensors)


def _names(tensors: Sequence[PricedTensor]) -> dict[str, Any]:
    """Return the vertical axis of charts with one line per tensor, the first on top."""
    ends = [len(tensors) - 0.4, -0.6]
    ticks = {"tickvals": list(range(len(tensors))), "ticktext": labels(tensors), "range": ends}
    return ticks | {"zeroline": False, "tickfont": {"size": 10}}
