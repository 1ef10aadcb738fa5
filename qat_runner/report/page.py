"""Self-contained HTML reports: one file with Plotly inside, opened from disk, without a network.

Python describes the charts (`Chart`), templates/ place them, and templates/page.js draws them in the light or dark
theme with Plotly's basic bundle in plotly/, which supports `TRACE_TYPES`.
"""

import base64
import functools
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qat_runner.runs.files import write_text
from qat_runner.wording import digits

CHOSEN, OTHER = 0, 1
"""Colours, as indices into those of templates/page.js: for the subject of the page and for what it is compared with."""

COLOURS, SYMBOLS = 8, ("circle", "square", "diamond", "triangle-up", "cross")
"""Number of colours, and the markers that tell lines of the same colour apart."""

FEW_EPOCHS = 12
"""Up to this number, every epoch has a tick."""

TRACE_TYPES = ("scatter", "bar", "pie")
"""Trace types that the bundle can draw."""

LARGEST = 1_500_000
"""Largest size of a page, in bytes."""

PlotlyTrace = dict[str, Any]
"""A Plotly trace, except that `colour` (an index) replaces Plotly's colours."""


@dataclass(frozen=True)
class View:
    """What a chart shows when the view is selected."""

    label: str
    traces: list[PlotlyTrace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart for the page's script to draw."""

    id: str
    heading: str
    views: list[View]
    """one view, or several that `selects` choose from"""
    layout: dict[str, Any] = field(default_factory=dict)
    """Plotly layout of all views"""
    height: int = 300
    """in pixels"""
    selects: tuple[str, ...] = ()
    """ids of the selectors in the template; with several, the last one steps through adjacent views"""
    logarithmic: str | None = None
    """id of the checkbox in the template that makes the y axis logarithmic"""


def axes(x: str = "", y: str = "", **layout: Any) -> dict[str, Any]:
    """Return a layout with axis titles; `layout` may contain further settings of xaxis and yaxis."""
    titles = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return {**layout, **{axis: title | layout.get(axis, {}) for axis, title in titles.items()}}


def line(x: Sequence[Any], y: Sequence[float | None], name: str, colour: int = CHOSEN, **more: Any) -> PlotlyTrace:
    """Return a line through points; NaN and None are gaps."""
    symbol = SYMBOLS[(colour + colour // COLOURS) % len(SYMBOLS)]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 40 else "lines",
        "x": list(x),
        "y": [rounded(value) for value in y],
        "name": name,
        "colour": colour % COLOURS,
        "line": {"width": 2},
        "marker": {"size": 6, "symbol": symbol},
        **more,
    }


def rounded(value: float | None) -> float | None:
    """Round to five digits, more than a screen shows; return None for a value that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def number(cell: float | None) -> float:
    """Return a cell of a CSV file; NaN if it is empty."""
    return math.nan if cell is None else cell


def write(path: Path, template: str, charts: Sequence[Chart], content: Mapping[str, Any]) -> Path:
    """Render a template to a file; return its path.

    Args:
        path: the file; its folder is created if necessary.
        template: name of a file in templates/, without its extensions.
        charts: all charts that the template places.
        content: other variables of the template.
    """
    environment = Environment(
        loader=PackageLoader("qat_runner.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["digits"] = digits
    specs = packed(json.dumps([asdict(chart) for chart in charts]))
    page = environment.get_template(f"{template}.html.j2").render(specs=specs, plotly=plotly(), **content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def packed(text: str) -> str:
    """Compress text and encode it for HTML: Plotly shrinks to a quarter, the charts of a large run to a tenth."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@functools.cache
def plotly() -> str:
    """Return the Plotly bundle, `packed`."""
    return packed(Path(__file__).with_name("plotly").joinpath("plotly-basic.min.js").read_text(encoding="utf-8"))
