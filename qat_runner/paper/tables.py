"""The paper's tables filled from runs: our mean over seeds beside the published number, and what is missing."""

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat_runner.config import run_name
from qat_runner.errors import ConfigError
from qat_runner.paper.averaged import averaged
from qat_runner.report.differing import differing_keys
from qat_runner.report.runs import Key, Run, by_precedence, recipe_of
from qat_runner.report.starts import start_apart
from qat_runner.report.tables import (
    Table,
    against_full_precision,
    full_precision_of,
    mean_and_deviation,
    of_some,
)
from qat_runner.runs.records import metric, score

FULL_PRECISION_ROWS = ("full_precision", "pretrained")


@functools.cache
def paper() -> dict[str, Any]:
    """Return the content of paper.yaml."""
    content = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper.yaml")))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


TABLES = tuple(name for name, value in paper().items() if isinstance(value, dict) and "rows" in value)
"""The names of the tables of runs."""


def published(table: str, model: str, row: str, bits: int | None) -> float | None:
    """Return the number published in a cell, in percent; None if there is none.

    Args:
        table: one of TABLES.
        model: the network.
        row: one of the table's rows; for full precision, the paper has one number per network in all its tables.
        bits: one of the table's bit-widths; None for full precision.
    """
    layout = paper()[table]
    rows = layout.get("published", {}).get(model, {})
    if row in FULL_PRECISION_ROWS:
        return paper()["full_precision"][model] if rows and "source" not in layout else None
    return rows[row][layout["bits"].index(bits)] if row in rows else None


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    model: str
    bits: int | None
    """None for full precision"""
    label: str
    runs: Sequence[Run]
    """the runs that the row averages, one for each seed, finished or not"""
    gaps: tuple[float, ...]
    """difference from full precision, in points, for each seed that has a full-precision run to compare with"""
    published: float | None
    """in percent"""
    published_baseline: float | None
    """the published full precision, in percent"""

    @property
    def text(self) -> str:
        """The method and the bits, in words."""
        return self.label if self.bits is None else f"{self.label}, {self.bits} bits"

    @property
    def values(self) -> tuple[float, ...]:
        """The table's metric for each finished seed, in percent."""
        return tuple(score(run.summary) for run in self.runs if run.summary is not None)

    @property
    def gap(self) -> float | None:
        """Our result minus our full precision, in points: the mean over the seeds that have both."""
        return statistics.fmean(self.gaps) if self.gaps else None

    @property
    def published_gap(self) -> float | None:
        """The published number minus the published full precision, in points."""
        return _minus(self.published, self.published_baseline)

    @property
    def difference(self) -> float | None:
        """Our gap minus the published gap, in points."""
        return _minus(self.gap, self.published_gap)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


@dataclass
class TableOfRuns:
    """One of TABLES, filled from runs."""

    name: str
    dataset: str
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """places of runs that no row averages, each with the reason in parentheses"""
    unlike: list[str] = field(default_factory=list)
    """sentences on rows whose settings differ in more than the method"""

    @property
    def layout(self) -> dict[str, Any]:
        """The table's part of paper.yaml."""
        layout: dict[str, Any] = paper()[self.name]
        return layout

    @property
    def metric(self) -> str:
        return str(self.layout.get("metric", "top1"))

    @property
    def columns(self) -> dict[str, list[str]]:
        """Header -> cells.

        Published numbers have a column if there are any; their differences from full precision have one if the table
        is the paper's.
        """
        columns = {
            "network": [row.model for row in self.rows],
            "bits": ["32" if row.bits is None else str(row.bits) for row in self.rows],
            "method": [row.label for row in self.rows],
            f"{self.metric} % (ours)": [mean_and_deviation(row.values) or "missing" for row in self.rows],
            "seeds": [str(len(row.values)) for row in self.rows],
            "against full precision": [of_some(_points(row.gap), len(row.gaps), len(row.values)) for row in self.rows],
        }
        if "published" in self.layout:
            columns["published %"] = ["" if row.published is None else f"{row.published:.2f}" for row in self.rows]
            if "source" not in self.layout:
                columns["published against full precision"] = [_points(row.published_gap) for row in self.rows]
                columns["difference of the two"] = [_points(row.difference) for row in self.rows]
        return columns

    def notes(self) -> list[str]:
        what = f"{self.metric} is that of the last epoch on the validation split"
        paired = (
            "The column 'against full precision' has the mean of the differences, paired by seed, from the "
            "full-precision run that is otherwise the same, or from the network that the run starts from. A number in "
            "parentheses counts the seeds that could be paired, if not all could."
        )
        notes = [f"Data: {self.dataset}. {what}; ± is the standard deviation over seeds. {paired}"]
        if "published" in self.layout:
            source, data = (self.layout.get(key, paper()[key]) for key in ("source", "data"))
            notes.append(f"Published numbers: {source}, on {data}.")
        began = {row.model for row in self.rows if row.values}
        missing = [f"{row.model}, {row.text}" for row in self.rows if row.model in began and not row.values]
        if missing:
            notes.append(f"Missing: {'; '.join(missing)}.")
        if absent := [model for model in dict.fromkeys(row.model for row in self.rows) if model not in began]:
            notes.append(f"No results for {', '.join(absent)}.")
        unfinished = [str(run.folder) for row in self.rows for run in row.runs if run.summary is None]
        if unfinished:
            notes.append(f"Unfinished: {', '.join(unfinished)}.")
        return [*notes, *self.warnings()]

    def warnings(self) -> list[str]:
        """Return sentences on runs that are left out, and on rows that differ in more than the method."""
        out = f"Left out, since the runs of a row may differ only in their seed: {'; '.join(self.left_out)}."
        return [*([out] if self.left_out else []), *self.unlike]

    def text(self, layout: str) -> str:
        """Return the table as markdown, csv, latex or html."""
        columns = self.columns
        cells = list(zip(*columns.values(), strict=True))
        return Table(f"{self.name}: {self.layout['title']}", list(columns), cells, self.notes()).text(layout)


def make_table(name: str, runs: Sequence[Run], dataset: str, only: str | None = None) -> TableOfRuns:
    """Fill a table with the runs of one data set.

    Args:
        name: one of TABLES.
        runs: all runs that were found; those of other tables are ignored.
        dataset: data set whose runs to use.
        only: network to show; None shows all networks that have runs or published numbers.

    Raises:
        ConfigError: a run does not have the table's metric, or the network does not exist.
    """
    layout, labels = paper()[name], paper()["labels"]
    table = TableOfRuns(name, dataset)
    ours = by_precedence(run for run in runs if run.dataset == dataset and _belongs(run, layout))
    for run in ours:
        if run.summary is not None and metric(run.summary) != table.metric:
            raise ConfigError(f"{name}: shows {table.metric}, which {run.text} does not have")
    found = {run.model for run in ours}
    models = [*sorted(found), *(model for model in layout.get("published", {}) if model not in found)]
    if only is not None and only not in models:
        raise ConfigError(f"--model {only}: {name} has {', '.join(models) or 'no network'}")
    baselines, gaps = _against_full_precision(ours)
    for model in models if only is None else [only]:
        mine = [run for run in ours if run.model == model]
        cells, left_out = averaged({cell: _in_cell(mine, *cell) for cell in _cells(layout)}, baselines)
        for (row, bits), some in cells.items():
            theirs = tuple(gaps[run.key] for run in some if run.key in gaps)
            base = None if bits is None else published(name, model, FULL_PRECISION_ROWS[0], None)
            table.rows.append(Row(model, bits, labels[row], some, theirs, published(name, model, row, bits), base))
        table.left_out += left_out
        table.unlike += _unlike(model, [row for row in table.rows if row.model == model and row.runs])
    return table


def _against_full_precision(runs: Sequence[Run]) -> tuple[dict[Key, Key], dict[Key, float]]:
    """Return the key of the full-precision run that each run is compared with, and the differences, in points.

    Of equal full-precision runs in one place, the first counts.

    Args:
        runs: in the order of `by_precedence`.
    """
    first: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if run.summary is not None:
            full = run.row in FULL_PRECISION_ROWS
            first.setdefault((run.place, run_name(run.config), run.processes) if full else run.key, run)
    done = list(first.values())
    results = [run.result for run in done]
    found = full_precision_of(results)
    gaps = zip(done, against_full_precision(results, found), strict=True)
    baselines = {run.key: done[i].key for run, i in zip(done, found, strict=True) if i is not None}
    return baselines, {run.key: gap for run, gap in gaps if gap is not None}


def _cells(layout: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Yield the rows of a table, each with its bits; None for full precision."""
    for row in layout["rows"]:
        for bits in [None] if row in FULL_PRECISION_ROWS else layout["bits"]:
            yield row, bits


def _in_cell(runs: Sequence[Run], row: str, bits: int | None) -> list[Run]:
    return [run for run in runs if run.row == row and bits in (None, run.weight_bits)]


def _unlike(model: str, rows: Sequence[Row]) -> list[str]:
    """Return a sentence on rows whose settings differ from the first quantized row in more than method and bits."""
    first = next((row for row in rows if row.bits is not None), None)
    if first is None:
        return []
    keys = {row.text: _keys_apart(first.runs, row.runs) for row in rows}
    differing = [f"{text} ({', '.join(some)})" for text, some in keys.items() if some]
    return [f"Rows with other settings than {model}, {first.text}: {'; '.join(differing)}."] if differing else []


def _keys_apart(one: Sequence[Run], other: Sequence[Run]) -> list[str]:
    """Return the keys in which two cells should not differ but do; "weights" if runs of one seed start from others."""
    keys = [key for key in differing_keys([recipe_of(one[0]), recipe_of(other[0])]) if key != "mode"]
    pairs = [(a.config, b.config) for a in one for b in other if a.seed == b.seed]
    return [*keys, *(["weights"] if any(start_apart(a, b) for a, b in pairs) else [])]


def _belongs(run: Run, layout: dict[str, Any]) -> bool:
    if run.row not in layout["rows"]:
        return False
    return run.row in FULL_PRECISION_ROWS or (run.mode == layout["mode"] and run.weight_bits in layout["bits"])
