"""Tables for the terminal and in files, and the differences from full precision that all reports show."""

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
    run_name,
    without_choice,
)
from qat_runner.config.tasks import Measure
from qat_runner.runs.records import measured, metric, score


class Result(NamedTuple):
    """A run, as tables know it."""

    config: Config
    summary: Mapping[str, Any]
    """the content of its summary.json; empty while it is not finished"""
    place: Path | None = None
    """the folder of runs, or the table of results, that it lies in"""


def results_table(results: Sequence[Result], beside: Sequence[Result] = ()) -> str:
    """A row a run, each less full precision as `against_full_precision` has it.

    Args:
        results: of the runs.
        beside: of others in full precision, which they may be compared with.
    """
    rows = []
    for result, difference in _with_differences(results, beside):
        s = result.summary
        rows.append(
            (
                *_words(s),
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
    return _table(rows, ["seed", head(found), "vs fp32", best_head(found), "SQNR dB", "per s", "s"])


def seeds_table(results: Sequence[Result], beside: Sequence[Result] = ()) -> str:
    """A row for all runs that differ in their seed alone: means, and standard deviations where there are several.

    Each run is compared with full precision of its own seed; "vs fp32" has mean and deviation of these differences, and
    their number where some of the seeds have none.

    Args:
        results, beside: as of `results_table`.
    """
    rows = []
    for runs, found in _over_seeds(results, beside):
        gap = of_some(mean_and_deviation(found, "+"), len(found), len(runs))
        rows.append((*_words(runs[0]), len(runs), mean_and_deviation([score(s) for s in runs]), gap))
    return _table(rows, ["seeds", head(measures(result.summary for result in results)), "vs fp32"])


def several_seeds(results: Sequence[Result]) -> bool:
    """Whether any two runs differ in their seed alone."""
    return any(len(runs) > 1 for runs, _ in _over_seeds(results))


def differences_in_words(results: Sequence[Result], beside: Sequence[Result] = ()) -> list[str]:
    """How far methods lie above or below full precision, a sentence for those that share network, data, mode and bits.

    A method without full precision or without another beside it is left out, and so is what differs in other keys, too:
    there the sentence would name a method twice.

    Args:
        results, beside: as of `results_table`.
    """
    told: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for runs, found in _over_seeds(results, beside):
        if found:
            model, dataset, mode, bits, clipping, gradient = _words(runs[0])
            method = clipping if gradient in ("mph", "own") else f"{clipping} with {gradient}"
            where = f"{model}, {dataset}, {mode}, {bits} bits"
            told.setdefault((where, measured(runs[0]).points), []).append((method, mean_and_deviation(found, "+")))
    return [
        f"{where}, in {points} against full precision: {', '.join(map(' '.join, methods))}"
        for (where, points), methods in told.items()
        if 1 < len(methods) == len(dict(methods))
    ]


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean, and the standard deviation over seeds where there are several; empty if there are none.

    Args:
        values: in any unit.
        sign: "+" to write the sign of a positive mean, too.
    """
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{spread}"


def of_some(told: str, count: int, seeds: int) -> str:
    """A mean over some of the seeds that it stands beside, with their number in parentheses where these are not all."""
    return f"{told} ({count})" if told and count != seeds else told


def against_full_precision(results: Sequence[Result]) -> list[float | None]:
    """How far each run lies above full precision, in points; None of full precision itself, and where it is missing.

    Points are of percent, or of a figure that is a plain number.

    It is compared with the run that differs from it in quantization alone; where there is none, with the full-precision
    network that it starts from. Runs that share all but method, bits, seed and weights are compared with one kind of
    the two: the closest that all of them have, else the one that most have; those that lack it have None.

    Where several full-precision runs compute the same, it is the one in the run's own place; where none is, they have
    to agree, or the run has None.
    """
    return [
        None if baseline is None else score(result.summary) - score(results[baseline].summary)
        for result, baseline in zip(results, full_precision_of(results), strict=True)
    ]


def full_precision_of(results: Sequence[Result]) -> list[int | None]:
    """Which of some runs is the full-precision one that each is compared with, as `against_full_precision` says."""
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
        best = max(theirs, key=lambda kind: len(kind) - kind.count(None))  # of several, the first
        for index, baseline in zip(some, best, strict=True):
            chosen[index] = baseline
    return chosen


def _first(
    results: Sequence[Result], found: Mapping[str, Sequence[int]], index: int, keys: Sequence[str]
) -> int | None:
    """The full-precision run that a run is compared with: by the first of some keys that there is one of."""
    several = (_one_of(results, index, found.get(key, ())) for key in keys)
    return next((one for one in several if one is not None), None)


def _one_of(results: Sequence[Result], index: int, some: Sequence[int]) -> int | None:
    """Of full-precision runs that compute the same, the one beside a run; None where that is not told."""
    run = results[index]
    some = [i for i in some if results[i].summary] or some
    some = [i for i in some if results[i].place == run.place] or some
    some = [i for i in some if results[i].config.seed == run.config.seed] or some  # of an evaluation any seed will do
    scores = {score(results[i].summary) for i in some if results[i].summary}
    return some[-1] if some and len(scores) <= 1 else None


def _comparison(config: Config) -> str:
    """The same for quantized runs that share all but method, bits, seed and weights: for rows of one table."""
    same = _in_full_precision(config)
    recipe = replace(same.recipe, batchnorm_batches=0)
    return run_name(replace(same, recipe=recipe, seed=0, weights=None))


def _in_full_precision(config: Config) -> Config:
    """A quantized run without quantization and what goes with it."""
    recipe = replace(config.recipe, distill=Distill.none, teacher=None)
    return replace(config, **in_full_precision() | without_choice() | {"policy": None}, recipe=recipe)


def _baselines(config: Config) -> list[tuple[str, ...]]:
    """Keys of the full-precision runs that a quantized one may be compared with, by kind, the closest first."""
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
    """The same for full-precision runs that compute the same: keys of quantization are without effect on them."""
    config = replace(config, backend="auto", log_excess_mse=False)
    by_seed = config.mode != Mode.evaluate or config.weights == BASELINE
    return run_name(config if by_seed else replace(config, seed=0))


def _with_differences(results: Sequence[Result], beside: Sequence[Result]) -> Iterator[tuple[Result, float | None]]:
    """Runs, and how far each lies above full precision, among these or beside them."""
    known = {(result.place, run_name(result.config)) for result in results}
    others = [other for other in beside if (other.place, run_name(other.config)) not in known]
    return zip(results, against_full_precision([*results, *others]), strict=False)


def _over_seeds(
    results: Sequence[Result], beside: Sequence[Result] = ()
) -> list[tuple[list[Mapping[str, Any]], list[float]]]:
    """Runs that differ in their seed alone, in groups: the summaries, and the differences from full precision.

    Of a run that is there twice, in two folders, one counts.
    """
    groups: dict[str, dict[int, tuple[Mapping[str, Any], float | None]]] = {}
    for result, difference in _with_differences(results, beside):
        seeds = groups.setdefault(run_name(replace(result.config, seed=0)), {})
        seeds[result.config.seed] = result.summary, difference
    return [
        ([summary for summary, _ in seeds.values()], [gap for _, gap in seeds.values() if gap is not None])
        for seeds in groups.values()
    ]


def _words(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What a run is, in the columns that all tables begin with."""
    clipping = "+".join([summary["clipping"], *summary.get("remedies", [])])
    clipping += ", distilled" if summary.get("distilled") else ""
    return (*(str(summary.get(key, "")) for key in ("model", "dataset", "mode", "bits")), clipping, summary["gradient"])


def measures(summaries: Iterable[Mapping[str, Any]]) -> list[Measure]:
    """What counts for some runs, each once."""
    return list(dict.fromkeys(map(measured, summaries)))


def head(found: Sequence[Measure]) -> str:
    """Of the column of figures that count: "top1/f1 %" for some of one unit."""
    if len({measure.unit for measure in found}) == 1:
        return Measure("/".join(measure.name for measure in found), found[0].unit).head
    return ", ".join(measure.head for measure in found)


def best_head(found: Sequence[Measure]) -> str:
    """Of the column of each run's best epoch."""
    units = {measure.unit for measure in found}
    return Measure("best", units.pop() if len(units) == 1 else "").head


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _table(rows: Sequence[Sequence[object]], figures: Sequence[str]) -> str:
    """Rows of words, as `_words` has them, and of figures, whose heads are given."""
    headers = ["model", "dataset", "mode", "bits", "clipping", "gradient", *figures]
    align = ["left"] * 3 + ["right"] + ["left"] * 2 + ["right"] * len(figures)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


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
        if layout == "latex":
            lines = "".join(f"% {line}\n" for line in (self.title, *self.notes))
            return f"{lines}{self._body('latex_booktabs')}\n"
        if layout == "html":
            return _page(self.title, self.section(1))
        return "\n\n".join(filter(None, [f"## {self.title}", self._body("github"), *self.notes])) + "\n"

    def section(self, level: int) -> str:
        """The table as a part of a page in HTML, under a heading of that level."""
        body = f'<div class="wide" tabindex="0">{self._body("html")}</div>\n' if self.cells else ""
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in self.notes)
        return _coded(f"<h{level}>{html.escape(self.title)}</h{level}>\n{body}{notes}")

    def _body(self, tablefmt: str) -> str:
        return tabulate(self.cells, self.headers, tablefmt=tablefmt, disable_numparse=True) if self.cells else ""


@dataclass(frozen=True)
class Document:
    """Several tables on one page. What stands between backticks, in cells and sentences, is code."""

    title: str
    lead: Sequence[str]
    """sentences before the first table"""
    tables: Sequence[Table]

    def text(self, layout: str) -> str:
        """The page as markdown or html."""
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
