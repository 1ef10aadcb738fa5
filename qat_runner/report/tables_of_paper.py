"""The paper's tables from a folder of runs: ours beside the published number, over seeds, with what is missing."""

import csv
import functools
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tabulate import tabulate

from qat_runner.errors import ConfigError
from qat_runner.report.runs import Run, check_seeds
from qat_runner.report.tables import mean_and_deviation

FULL_PRECISION_ROWS = ("full_precision", "pretrained")
UNKNOWN = "unknown"


@functools.cache
def paper() -> dict[str, Any]:
    """The content of paper.yaml."""
    content = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper.yaml")))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


TABLES = tuple(name for name, value in paper().items() if isinstance(value, dict) and "rows" in value)
"""The names of the tables."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    model: str
    bits: int | None
    """None in full precision"""
    name: str
    label: str
    values: tuple[float, ...]
    """the table's metric, of each finished seed, in percent"""
    gap: float | None
    """mean value minus that of full precision; None where either is missing"""
    published: float | None
    published_gap: float | None
    second_hand: bool

    def cells(self) -> tuple[str, ...]:
        return (
            self.model,
            "32" if self.bits is None else str(self.bits),
            self.label,
            mean_and_deviation(self.values) if self.values else "missing",
            str(len(self.values)),
            "" if self.gap is None else f"{self.gap:+.2f}",
            UNKNOWN if self.published is None else f"{self.published:.2f}{'*' if self.second_hand else ''}",
            "" if self.published_gap is None else f"{self.published_gap:+.2f}",
        )


@dataclass
class Table:
    """One of the paper's tables, filled."""

    name: str
    title: str
    metric: str
    dataset: str
    rows: list[Row] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    """folders of runs that belong here and have no result yet"""

    @property
    def headers(self) -> tuple[str, ...]:
        ours = f"{self.metric} % (ours)"
        return "network", "bits", "method", ours, "seeds", "against full precision", "published %", "published gap"

    @property
    def missing(self) -> list[str]:
        """What no run was found for, a name each."""
        return [
            f"{row.model}, {row.label}" + ("" if row.bits is None else f", {row.bits} bits")
            for row in self.rows
            if not row.values
        ]

    def notes(self) -> list[str]:
        what = f"{self.metric} of the last epoch on the validation half"
        notes = [f"Data: {self.dataset}. {what}; ± is the deviation over seeds."]
        published = "SQuAD v1.1" if self.metric == "f1" else "ImageNet"
        notes.append(f"Published figures are for {published}; unknown ones are not known to us.")
        if any(row.second_hand and row.published is not None for row in self.rows):
            notes.append("* read from a third party's summary of the paper.")
        if self.missing:
            notes.append(f"Missing: {'; '.join(self.missing)}.")
        if self.unfinished:
            notes.append(f"Unfinished: {', '.join(self.unfinished)}.")
        return notes

    def text(self, layout: str) -> str:
        """The table as markdown, csv, latex or html."""
        cells = [row.cells() for row in self.rows]
        if layout == "csv":
            out = io.StringIO()
            csv.writer(out).writerows([self.headers, *cells])
            return out.getvalue()
        tablefmt = {"markdown": "github", "latex": "latex_booktabs", "html": "html"}[layout]
        body = tabulate(cells, self.headers, tablefmt=tablefmt, disable_numparse=True)
        if layout == "latex":
            return body + "\n"
        if layout == "html":
            notes = "".join(f"<p>{note}</p>" for note in self.notes())
            return _PAGE.format(title=f"{self.name}: {self.title}", body=body, notes=notes)
        return "\n\n".join([f"## {self.name}: {self.title}", body, *self.notes()]) + "\n"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .3em .8em; border-bottom: 1px solid #8886; text-align: left }}
</style></head><body><h1>{title}</h1>
{body}
{notes}
</body></html>
"""


def make_table(name: str, runs: Sequence[Run], dataset: str, only: str | None = None) -> Table:
    """Fill a table with the runs of one data set.

    Args:
        name: one of TABLES.
        runs: as found; those that belong to other tables are passed over.
        dataset: whose runs.
        only: of which network; None: of all that the table has, or that runs were found of.

    Raises:
        ConfigError: runs that would share a cell differ in more than their seed.
    """
    layout, labels = paper()[name], paper()["labels"]
    table = Table(name, layout["title"], layout.get("metric", "top1"), dataset)
    ours = [run for run in runs if run.dataset == dataset and _belongs(run, layout)]
    for run in ours:
        if run.summary is not None and table.metric not in run.summary:
            raise ConfigError(f"{name}: is about {table.metric}, which {run.folder.name} does not have")
    found = {run.model for run in ours}
    models = [m for m in layout["models"] if m in found or dataset in ("imagenet", "squad")]
    models += sorted(found - {*models})
    for model in models if only is None else [only]:
        baseline: float | None = None
        published = layout["published"].get(model, {})
        for row in layout["rows"]:
            full = row in FULL_PRECISION_ROWS
            for bits in [None] if full else layout["bits"]:
                mine = [r for r in ours if (r.model, r.row) == (model, row) and (full or r.weight_bits == bits)]
                check_seeds(mine)
                table.unfinished += [str(run.folder) for run in mine if run.summary is None]
                values = tuple(run.summary[table.metric] for run in mine if run.summary is not None)
                mean = statistics.fmean(values) if values else math.nan
                baseline = mean if full and values else baseline
                value = published.get(row if full else f"{row}/{bits}")
                known = [published[key] for key in FULL_PRECISION_ROWS if key in published]
                table.rows.append(
                    Row(
                        model,
                        bits,
                        row,
                        labels[row],
                        values,
                        None if full or baseline is None or not values else mean - baseline,
                        value,
                        None if full or value is None or not known else value - known[0],
                        model in layout.get("second_hand", []),
                    )
                )
    return table


def _belongs(run: Run, layout: dict[str, Any]) -> bool:
    if run.row not in layout["rows"]:
        return False
    return run.row in FULL_PRECISION_ROWS or (run.mode == layout["mode"] and run.weight_bits in layout["bits"])
