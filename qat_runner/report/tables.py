"""Tables for the terminal and for files, and the differences from full precision that all reports show."""

import csv
import html
import io
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from qat_runner.config import (
    BASELINE,
    Config,
    Distill,
    Mode,
    baseline_of,
    in_full_precision,
    policy_label,
    run_name,
    without_choice,
)
from qat_runner.config.schema import MIXED
from qat_runner.config.tasks import Measure
from qat_runner.runs.records import measured, metric, score


class Result(NamedTuple):
    """The data of a run that tables use."""

    config: Config
    summary: Mapping[str, Any]
    """the content of summary.json; empty while the run is unfinished"""
    place: Path | None = None
    """the folder of runs, or the table of results, that contains the run"""


def results_table(results: Sequence[Result], beside: Sequence[Result] = ()) -> str:
    """Return a table with a row per run, including its difference from full precision (`against_full_precision`).

    Args:
        results: the runs.
        beside: further full-precision runs that they may be compared with.
    """
    rows = []
    for result, difference in _with_differences(results, beside):
        s = result.summary
        rows.append(
            (
                *_words(result),
                s["seed"],
                _number(score(s), 2),
                "" if difference is None else f"{difference:+.2f}",
                _number(s.get(f"best_{metric(s)}"), 2),
                _number(s["sqnr_db"], 1),
                _number(s.get("samples_per_second"), 0 if (s.get("samples_per_second") or 0) >= 100 else 1),
                _number(s["seconds"], 1),
            )
        )
    found = measures(result.summary for result in results)
    return _table(rows, ["seed", head(found), "vs fp32", best_head(found), "SQNR dB", "samples/s", "time (s)"])


def seeds_table(results: Sequence[Result], beside: Sequence[Result] = ()) -> str:
    """Return a table with a row for runs that differ only in their seed: means, and standard deviations over seeds.

    Each run is compared with full precision of its own seed; "vs fp32" has mean and standard deviation of these
    differences, and their number if some seeds have none.

    Args:
        results, beside: as for `results_table`.
    """
    rows = []
    for runs, found in _over_seeds(results, beside):
        gap = of_some(mean_and_deviation(found, "+"), len(found), len(runs))
        rows.append((*_words(runs[0]), len(runs), mean_and_deviation([score(run.summary) for run in runs]), gap))
    return _table(rows, ["seeds", head(measures(result.summary for result in results)), "vs fp32"])


def several_seeds(results: Sequence[Result]) -> bool:
    """Return whether any two runs differ only in their seed."""
    return any(len(runs) > 1 for runs, _ in _over_seeds(results))


def differences_in_words(results: Sequence[Result], beside: Sequence[Result] = ()) -> list[str]:
    """Return sentences with the methods' differences from full precision, one per network, data set, mode and bits.

    A method without full precision, or without another method to list beside it, is left out. So are methods whose
    runs differ in further keys, since the sentence would name such a method twice.

    Args:
        results, beside: as for `results_table`.
    """
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for runs, found in _over_seeds(results, beside):
        if found:
            model, dataset, mode, bits, clipping, gradient = _words(runs[0])
            method = clipping if gradient in ("mph", "own") else f"{clipping} with {gradient}"
            where = f"{model}, {dataset}, {mode}, {bits} bits"
            groups.setdefault((where, measured(runs[0].summary).points), []).append(
                (method, mean_and_deviation(found, "+"))
            )
    return [
        f"{where}, in {points} against full precision: {', '.join(map(' '.join, methods))}"
        for (where, points), methods in groups.items()
        if 1 < len(methods) == len(dict(methods))
    ]


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Return the mean as text, with the standard deviation if there are several values; empty if there are none.

    Args:
        values: in any unit, one per seed.
        sign: "+" to include the sign of a positive mean.
    """
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{spread}"


def of_some(figure: str, count: int, seeds: int) -> str:
    """Return the text of a mean, with the number of its seeds in parentheses if these are not all seeds."""
    return f"{figure} ({count})" if figure and count != seeds else figure


def against_full_precision(
    results: Sequence[Result], baselines: Sequence[int | None] | None = None
) -> list[float | None]:
    """Return each run's result minus full precision, in points; None for full precision itself, or if it is missing.

    Points are percentage points, or the unit of a metric that is a plain number.

    A run is compared with the full-precision run that differs only in quantization, or else with the full-precision
    network that it starts from. Runs that share everything but method, bits, seed and weights all use the same one of
    these two kinds: the closest kind that all of them have, or else the kind that most have; runs without it get None.

    If several full-precision runs compute the same, the one in the run's own folder or table counts. If none is
    there, their results have to agree; otherwise the run gets None.

    Args:
        results: of all runs.
        baselines: `full_precision_of(results)`, if it is known already.
    """
    return [
        None if baseline is None else score(result.summary) - score(results[baseline].summary)
        for result, baseline in zip(results, baselines or full_precision_of(results), strict=True)
    ]


def full_precision_of(results: Sequence[Result]) -> list[int | None]:
    """Return the index of the full-precision run that each run is compared with, see `against_full_precision`."""
    found: dict[str, list[int]] = {}
    compared: dict[str, list[int]] = {}
    for index, (config, *_) in enumerate(results):
        full_precision = config.quantization.full_precision
        group, key = (found, _key(config)) if full_precision else (compared, _comparison(config))
        group.setdefault(key, []).append(index)
    chosen: list[int | None] = [None] * len(results)
    for some in compared.values():
        kinds = zip_longest(*(_baselines(results[index].config) for index in some), fillvalue=())
        theirs = [[_first(results, found, *pair) for pair in zip(some, kind, strict=True)] for kind in kinds]
        best = max(theirs, key=lambda kind: len(kind) - kind.count(None))  # the first of equally good kinds
        for index, baseline in zip(some, best, strict=True):
            chosen[index] = baseline
    return chosen


def _first(
    results: Sequence[Result], found: Mapping[str, Sequence[int]], index: int, keys: Sequence[str]
) -> int | None:
    """Return the full-precision run of a run, by the first key for which there is one."""
    several = (_one_of(results, index, found.get(key, ())) for key in keys)
    return next((one for one in several if one is not None), None)


def _one_of(results: Sequence[Result], index: int, some: Sequence[int]) -> int | None:
    """Return the one of equal full-precision runs that belongs to a run; None if they disagree."""
    run = results[index]
    some = [i for i in some if results[i].summary] or some
    some = [i for i in some if results[i].place == run.place] or some
    some = [i for i in some if results[i].config.seed == run.config.seed] or some  # for an evaluation, any seed is fine
    scores = {score(results[i].summary) for i in some if results[i].summary}
    return some[-1] if some and len(scores) <= 1 else None


def _comparison(config: Config) -> str:
    """Return a key that quantized runs share if they differ only in method, bits, seed and weights."""
    same = _in_full_precision(config)
    recipe = replace(same.recipe, batchnorm_batches=0)
    return run_name(replace(same, recipe=recipe, seed=0, weights=None))


def _in_full_precision(config: Config) -> Config:
    """Return the config of a quantized run without quantization and everything that depends on it."""
    recipe = replace(config.recipe, distill=Distill.none, teacher=None)
    return replace(config, **in_full_precision() | without_choice() | {"policy": None}, recipe=recipe)


def _baselines(config: Config) -> list[tuple[str, ...]]:
    """Return keys of the full-precision runs that a quantized run may be compared with, by kind, the closest first."""
    same = _in_full_precision(config)
    trained: list[tuple[str, ...]] = [
        (_key(same),),
        (_key(replace(same, recipe=replace(same.recipe, batchnorm_batches=0))),),
    ]
    if config.weights is None:
        return trained
    start = _key(replace(same, mode=Mode.evaluate))
    return [*trained, (start, _key(baseline_of(config))) if config.weights == BASELINE else (start,)]


def _key(config: Config) -> str:
    """Return a key that full-precision runs share if they compute the same, whatever their quantization keys."""
    config = replace(config, backend="auto", log_excess_mse=False)
    by_seed = config.mode != Mode.evaluate or config.weights == BASELINE
    return run_name(config if by_seed else replace(config, seed=0))


def _with_differences(results: Sequence[Result], beside: Sequence[Result]) -> Iterator[tuple[Result, float | None]]:
    """Yield the runs, each with its difference from full precision, which may be among `results` or `beside`."""
    known = {(result.place, run_name(result.config)) for result in results}
    others = [other for other in beside if (other.place, run_name(other.config)) not in known]
    return zip(results, against_full_precision([*results, *others]), strict=False)


def _over_seeds(results: Sequence[Result], beside: Sequence[Result] = ()) -> list[tuple[list[Result], list[float]]]:
    """Group runs that differ only in their seed; return the runs and full-precision differences of each group.

    A run that exists in two folders counts once.
    """
    groups: dict[str, dict[int, tuple[Result, float | None]]] = {}
    for result, difference in _with_differences(results, beside):
        seeds = groups.setdefault(run_name(replace(result.config, seed=0)), {})
        seeds[result.config.seed] = result, difference
    return [
        ([result for result, _ in seeds.values()], [gap for _, gap in seeds.values() if gap is not None])
        for seeds in groups.values()
    ]


def _words(result: Result) -> tuple[str, ...]:
    """Return the cells of the columns that all tables begin with, which identify a run."""
    summary, policy = result.summary, policy_label(result.config)
    remedies = [word for word in summary.get("remedies", []) if word != MIXED]  # the policy says more
    clipping = "+".join([summary["clipping"], *remedies])
    clipping = ", ".join(filter(None, [clipping, policy, "distilled" if summary.get("distilled") else ""]))
    return (*(str(summary.get(key, "")) for key in ("model", "dataset", "mode", "bits")), clipping, summary["gradient"])


def measures(summaries: Iterable[Mapping[str, Any]]) -> list[Measure]:
    """Return the metrics of some runs, each once."""
    return list(dict.fromkeys(map(measured, summaries)))


def head(found: Sequence[Measure]) -> str:
    """Return the header of the metric column: "top1/f1 %" for metrics that share a unit."""
    if len({measure.unit for measure in found}) == 1:
        return Measure("/".join(measure.name for measure in found), found[0].unit).head
    return ", ".join(measure.head for measure in found)


def best_head(found: Sequence[Measure]) -> str:
    """Return the header of the column with each run's best epoch."""
    units = {measure.unit for measure in found}
    return Measure("best", units.pop() if len(units) == 1 else "").head


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _table(rows: Sequence[Sequence[object]], figures: Sequence[str]) -> str:
    """Format rows that begin with the cells of `_words` and continue with numbers, whose headers are given."""
    headers = ["model", "dataset", "mode", "bits", "clipping", "gradient", *figures]
    align = ["left"] * 3 + ["right"] + ["left"] * 2 + ["right"] * len(figures)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


@dataclass(frozen=True)
class Table:
    """A table that can be written in several formats."""

    title: str
    headers: Sequence[str]
    cells: Sequence[Sequence[str]]
    """rows"""
    notes: Sequence[str]
    """sentences below the table; left out in CSV, comments in LaTeX"""

    def text(self, layout: str) -> str:
        """Return the table as markdown, csv, latex or html."""
        if layout == "csv":
            out = io.StringIO()
            csv.writer(out).writerows([self.headers, *self.cells])
            return out.getvalue()
        if layout == "latex":
            lines = "".join(f"% {line}\n" for line in (self.title, *self.notes))
            return f"{lines}{self._body('latex_booktabs')}\n"
        if layout == "html":
            return _page(self.title, self.section(1))
        return "\n\n".join(filter(None, [f"## {self.title}", self._body("github"), *self.notes])) + "\n"

    def section(self, level: int) -> str:
        """Return the table as a section of an HTML page, with a heading of the given level."""
        body = f'<div class="wide" tabindex="0">{self._body("html")}</div>\n' if self.cells else ""
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in self.notes)
        return _coded(f"<h{level}>{html.escape(self.title)}</h{level}>\n{body}{notes}")

    def _body(self, tablefmt: str) -> str:
        return tabulate(self.cells, self.headers, tablefmt=tablefmt, disable_numparse=True) if self.cells else ""


@dataclass(frozen=True)
class Document:
    """Several tables on one page. Text between backticks, in cells and sentences, is code."""

    title: str
    lead: Sequence[str]
    """sentences before the first table"""
    tables: Sequence[Table]

    def text(self, layout: str) -> str:
        """Return the page as markdown or html."""
        if layout == "html":
            lead = Table(self.title, [], [], self.lead).section(1)
            return _page(self.title, lead, *(table.section(2) for table in self.tables))
        return (
            "\n\n".join([f"# {self.title}", *self.lead, *(table.text(layout).strip() for table in self.tables)]) + "\n"
        )


def _page(title: str, *sections: str) -> str:
    return _PAGE.format(title=html.escape(title), body="".join(sections))


def _coded(markup: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", markup)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3em .8em; border-bottom: 1px solid #8886; text-align: left; vertical-align: top }}
.wide {{ overflow-x: auto }} h1, h2, p {{ overflow-wrap: anywhere }} p {{ max-width: 75ch }} code {{ font-size: .9em }}
td code {{ display: inline-block; min-width: min(24em, 70vw) }}
</style></head><body>
{body}</body></html>
"""
