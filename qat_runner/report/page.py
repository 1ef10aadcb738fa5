"""Pages that hold all they need: one HTML file, Plotly inside, opened from disk."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from qat_runner.report.plots import CHOSEN, OTHER
from qat_runner.training.tracking import write_text

COLOURS = (CHOSEN, OTHER, "#3b9a83", "#b4578f", "#8a8f2c", "#7a6bc4", "#c2503f", "#5f7f95")
"""Told apart by colour-blind eyes, on white as on black."""

DASHES = ("solid", "dash", "dot", "dashdot")

Chart = dict[str, Any]
"""What the page's script draws: id, heading, height, layout, and traces; or `options`, each with a label and traces of
its own, that a selector chooses from."""


def chart(
    name: str, traces: Sequence[Mapping[str, Any]], x: str, y: str, heading: str = "", height: int = 340, **layout: Any
) -> Chart:
    """A chart of traces as Plotly has them, with titles of the axes."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for axis in axes:
        axes[axis] |= layout.pop(axis, {})
    return {"id": name, "heading": heading, "height": height, "traces": list(traces), "layout": {**axes, **layout}}


def selected(
    name: str,
    options: Sequence[Mapping[str, Any]],
    select: str,
    x: str,
    y: str,
    heading: str = "",
    log: bool = False,
    **layout: Any,
) -> Chart:
    """A chart that shows one of several options, each with label, traces and, if need be, a layout.

    Args:
        select: what is selected, in a word.
        log: whether a box makes the y axis logarithmic, as it is at first.
    """
    whole = chart(name, [], x, y, heading, **layout)
    del whole["traces"]
    return {**whole, "options": list(options), "select": select, "log": log}


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: int = 0, **more: Any) -> dict[str, Any]:
    """A trace of points and the lines between them; `colour` counts through COLOURS, then through DASHES."""
    line_style = {"color": COLOURS[colour % len(COLOURS)], "dash": DASHES[colour // len(COLOURS) % len(DASHES)]}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": [rounded(value) for value in y],
        "name": name,
        "line": line_style | {"width": 1.75},
        "marker": {"size": 5},
        **more,
    }


def rounded(value: float | None) -> float | None:
    """To four digits, which is what a screen shows; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def number(text: str | float | None) -> float:
    """A cell of a CSV file; NaN where there is none."""
    return math.nan if text in (None, "") else float(text)


def write(path: Path, template: str, charts: Sequence[Chart], **content: Any) -> Path:
    """Render a template to a file; returns its path.

    Args:
        path: the file.
        template: a name in templates/, without its endings.
        charts: of the page; the template places them.
        **content: what else the template needs.
    """
    environment = Environment(
        loader=PackageLoader("qat_runner.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(f"{template}.html.j2").render(
        charts=charts, plotly=Markup(get_plotlyjs()), **content
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path
