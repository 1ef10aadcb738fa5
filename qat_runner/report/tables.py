"""Tables for the terminal, and in files."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def results_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A row a run, from summary.json, each beside full precision as `against_full_precision` has it."""
    metrics = "/".join(dict.fromkeys(metric(s) for s in summaries))
    rows = []
    for s, difference in zip(summaries, against_full_precision(summaries), strict=True):
        drop = "" if difference is None else f"{difference:+.2f}"
        rows.append(
            (
                s["model"],
                s["dataset"],
                s["mode"],
                s["bits"],
                s["clipping"] + (", distilled" if s.get("distilled") else ""),
                s["gradient"],
                s["seed"],
                _number(accuracy(s), 2),
                drop,
                _number(s[f"best_{metric(s)}"], 2),
                _number(s["sqnr_db"], 1),
                _number(s["samples_per_second"], 0 if (s["samples_per_second"] or 0) >= 100 else 1),
                _number(s["seconds"], 1),
            )
        )
    headers = [
        "model",
        "dataset",
        "mode",
        "bits",
        "clipping",
        "gradient",
        "seed",
        f"{metrics} %",
        "vs fp32",
        "best %",
        "SQNR dB",
        "per s",
        "s",
    ]
    return tabulate(
        rows, headers, disable_numparse=True, colalign=["left"] * 3 + ["right"] + ["left"] * 2 + ["right"] * 7
    )


def against_full_precision(summaries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """How far each run lies above the full-precision run of the same model, data, mode and seed, in points.

    Where there is none, above the full-precision network as it is, which retraining starts from; None without either.
    """
    baselines = {_setting(s): accuracy(s) for s in summaries if s["clipping"] == "none"}
    starts = {_setting(s)[:2]: accuracy(s) for s in summaries if s["clipping"] == "none" and s["mode"] == "evaluate"}
    found = [baselines.get(_setting(s), starts.get(_setting(s)[:2])) for s in summaries]
    return [
        None if baseline is None or s["clipping"] == "none" else accuracy(s) - baseline
        for s, baseline in zip(summaries, found, strict=True)
    ]


def metric(summary: Mapping[str, Any]) -> str:
    """Name of the figure of a run that counts; records of old do not tell."""
    return str(summary.get("metric") or ("f1" if "f1" in summary else "top1"))


def accuracy(summary: Mapping[str, Any]) -> float:
    """The figure of a run that counts, in percent."""
    return float(summary[metric(summary)])


def _setting(summary: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(summary[key] for key in ("model", "dataset", "mode", "seed"))


@dataclass(frozen=True)
class Table:
    """A table that is written in several layouts."""

    title: str
    headers: Sequence[str]
    cells: Sequence[Sequence[str]]
    """rows"""
    notes: Sequence[str]
    """sentences under it; of CSV they are no part, in LaTeX they are comments"""

    def text(self, layout: str) -> str:
        """The table as markdown, csv, latex or html."""
        if layout == "csv":
            out = io.StringIO()
            csv.writer(out).writerows([self.headers, *self.cells])
            return out.getvalue()
        tablefmt = {"markdown": "github", "latex": "latex_booktabs", "html": "html"}[layout]
        body = tabulate(self.cells, self.headers, tablefmt=tablefmt, disable_numparse=True)
        if layout == "latex":
            return "".join(f"% {line}\n" for line in (self.title, *self.notes)) + body + "\n"
        if layout == "html":
            notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
            return _PAGE.format(title=html.escape(self.title), body=body, notes=notes)
        return "\n\n".join([f"## {self.title}", body, *self.notes]) + "\n"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .3em .8em; border-bottom: 1px solid #8886; text-align: left }}
</style></head><body><h1>{title}</h1>
{body}
{notes}
</body></html>
"""
