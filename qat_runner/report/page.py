"""Pages that hold all they need: one HTML file with Plotly inside, opened from disk, without a network.

Python says what is drawn (`Chart`), templates/ say where, and templates/page.js draws it in the colours of the day, by
plotly/, which is Plotly's own bundle of the plainest traces: `TRACE_TYPES`.
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
"""Colours, as indices into those of templates/page.js: what the page is about, and what it is compared with."""

COLOURS, SYMBOLS = 8, ("circle", "square", "diamond", "triangle-up", "cross")
"""How many colours there are; and what tells lines apart beside them."""

FEW_EPOCHS = 12
"""So many have a tick each."""

TRACE_TYPES = ("scatter", "bar", "pie")
"""That the bundle can draw."""

LARGEST = 1_500_000
"""Bytes of a page, at most."""

PlotlyTrace = dict[str, Any]
"""As Plotly has it, but for `colour`, an index, in place of its colours."""


@dataclass(frozen=True)
class View:
    """What a chart shows when it is chosen."""

    label: str
    traces: list[PlotlyTrace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int | None = None


@dataclass(frozen=True)
class Chart:
    """What the page's script draws."""

    id: str
    heading: str
    views: list[View]
    """one, or several of which `selects` choose"""
    layout: dict[str, Any] = field(default_factory=dict)
    """of all views"""
    height: int = 300
    """pixels"""
    selects: tuple[str, ...] = ()
    """ids of the selectors in the template; of several the last goes through neighbouring views"""
    logarithmic: str | None = None
    """id of the box in the template that makes the y axis logarithmic"""


def axes(x: str = "", y: str = "", **layout: Any) -> dict[str, Any]:
    """A layout with titles of the axes; `layout` may hold more of xaxis and yaxis."""
    titles = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return {**layout, **{axis: title | layout.get(axis, {}) for axis, title in titles.items()}}


def line(x: Sequence[Any], y: Sequence[float | None], name: str, colour: int = CHOSEN, **more: Any) -> PlotlyTrace:
    """A line through points; NaN and None are gaps."""
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
    """To five digits, which is more than a screen shows; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def number(cell: float | None) -> float:
    """A cell of a CSV file; NaN where there is none."""
    return math.nan if cell is None else cell


def shown(value: Any) -> str:
    """A value of a config, as its reader would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def write(path: Path, template: str, charts: Sequence[Chart], content: Mapping[str, Any]) -> Path:
    """Render a template to a file; returns its path.

    Args:
        path: the file; its folder is made if need be.
        template: a name in templates/, without its endings.
        charts: all that the template places.
        content: what else it shows.
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
    """Compressed, and in letters that HTML leaves alone: a quarter of Plotly, a tenth of a large run's charts."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@functools.cache
def plotly() -> str:
    """The bundle, `packed`."""
    return packed(Path(__file__).with_name("plotly").joinpath("plotly-basic.min.js").read_text(encoding="utf-8"))
