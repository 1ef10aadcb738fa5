"""The paper's tables filled from runs: our mean over seeds beside the published number, and what is missing."""

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat_runner.errors import ConfigError
from qat_runner.report.runs import Key, Run, check_seeds, differing_keys, recipe_of
from qat_runner.report.starts import start_apart
from qat_runner.report.tables import (
    Result,
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
    values: tuple[float, ...]
    """the table's metric for each finished seed, in percent"""
    gaps: tuple[float, ...]
    """difference from full precision, in points, for each seed that has a full-precision run to compare with"""
    published: float | None
    """in percent"""
    published_baseline: float | None
    """the published full precision, in percent"""

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
    unfinished: list[str] = field(default_factory=list)
    """folders of runs that belong to this table and have no result yet"""
    left_out: list[str] = field(default_factory=list)
    """folders of full-precision runs that no quantized run of this table is compared with"""
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
        missing = [
            f"{row.model}, {row.label}" + ("" if row.bits is None else f", {row.bits} bits")
            for row in self.rows
            if row.model in began and not row.values
        ]
        if missing:
            notes.append(f"Missing: {'; '.join(missing)}.")
        if absent := [model for model in dict.fromkeys(row.model for row in self.rows) if model not in began]:
            notes.append(f"No results for {', '.join(absent)}.")
        if self.unfinished:
            notes.append(f"Unfinished: {', '.join(self.unfinished)}.")
        if self.left_out:
            notes.append(
                "Left out, since they have other settings than the full precision that the quantized runs are compared "
                f"with: {', '.join(self.left_out)}."
            )
        return [*notes, *self.unlike]

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
        ConfigError: runs that would share a cell differ in more than their seed, or the network does not exist.
    """
    layout, labels = paper()[name], paper()["labels"]
    table = TableOfRuns(name, dataset)
    ours = [run for run in runs if run.dataset == dataset and _belongs(run, layout)]
    for run in ours:
        if run.summary is not None and metric(run.summary) != table.metric:
            raise ConfigError(f"{name}: shows {table.metric}, which {run.text} does not have")
    found = {run.model for run in ours}
    models = [*sorted(found), *(model for model in layout.get("published", {}) if model not in found)]
    if only is not None and only not in models:
        raise ConfigError(f"--model {only}: {name} has {', '.join(models) or 'no network'}")
    done = [(run, run.summary) for run in ours if run.summary is not None]
    results = [Result(run.config, summary, run.place) for run, summary in done]
    baselines = full_precision_of(results)
    gaps = against_full_precision(results, baselines)
    compared_with = {done[i][0].key for i in baselines if i is not None}
    gap_of = {run.key: gap for (run, _), gap in zip(done, gaps, strict=True) if gap is not None}
    for model in models if only is None else [only]:
        cells: dict[str, Sequence[Run]] = {}
        for row, bits in _cells(layout):
            mine = [r for r in ours if (r.model, r.row, bits or r.weight_bits) == (model, row, r.weight_bits)]
            if bits is None:
                mine, others = _that_serve(mine, compared_with)
                table.left_out += [str(run.folder) for run in others]
            check_seeds([run for run in mine if run.summary is not None])
            table.unfinished += [str(run.folder) for run in mine if run.summary is None]
            values = tuple(score(run.summary) for run in mine if run.summary is not None)
            theirs = tuple(gap_of[run.key] for run in mine if run.key in gap_of)
            base = None if bits is None else published(name, model, FULL_PRECISION_ROWS[0], None)
            table.rows.append(Row(model, bits, labels[row], values, theirs, published(name, model, row, bits), base))
            if mine:
                cells[labels[row] if bits is None else f"{labels[row]}, {bits} bits"] = mine
        table.unlike += _unlike(model, cells)
    return table


def _that_serve(runs: Sequence[Run], compared_with: Set[Key]) -> tuple[list[Run], list[Run]]:
    """Split the full-precision runs of a cell into those with the settings of the ones that quantized runs are compared
    with, or without a result, and the others, such as the baseline that another run made for its own epochs. Without
    any comparison, all belong to the cell."""
    settings = [run.setting for run in runs if run.key in compared_with]
    serve = [run for run in runs if run.setting in settings or not settings or run.summary is None]
    return serve, [run for run in runs if run not in serve]


def _cells(layout: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Yield the rows of a table, each with its bits; None for full precision."""
    for row in layout["rows"]:
        for bits in [None] if row in FULL_PRECISION_ROWS else layout["bits"]:
            yield row, bits


def _unlike(model: str, cells: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return a sentence on cells whose settings differ from the first quantized cell in more than method and bits."""
    quantized = [label for label, runs in cells.items() if runs[0].row not in FULL_PRECISION_ROWS]
    if not quantized:
        return []
    keys = {label: _keys_apart(cells[quantized[0]], runs) for label, runs in cells.items()}
    differing = [f"{label} ({', '.join(some)})" for label, some in keys.items() if some]
    return [f"Rows with other settings than {model}, {quantized[0]}: {'; '.join(differing)}."] if differing else []


def _keys_apart(one: Sequence[Run], other: Sequence[Run]) -> list[str]:
    """Return the keys in which two cells should not differ but do; "weights" if runs of one seed start from others."""
    keys = [key for key in differing_keys([recipe_of(one[0].config), recipe_of(other[0].config)]) if key != "mode"]
    pairs = [(a.config, b.config) for a in one for b in other if a.seed == b.seed]
    return [*keys, *(["weights"] if any(start_apart(a, b) for a, b in pairs) else [])]


def _belongs(run: Run, layout: dict[str, Any]) -> bool:
    if run.row not in layout["rows"]:
        return False
    return run.row in FULL_PRECISION_ROWS or (run.mode == layout["mode"] and run.weight_bits in layout["bits"])
