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
from qat_runner.config.fingerprints import fingerprint
from qat_runner.config.schema import MIXED
from qat_runner.config.tasks import Measure
from qat_runner.report.differing import in_words, keys_that_differ, processes_of, settings_of
from qat_runner.runs.folder import BEST_CHECKPOINT, CHECKPOINTS, LAST_CHECKPOINT, RunFolder
from qat_runner.runs.records import measured, metric, score


class Result(NamedTuple):
    """The data of a run that tables use."""

    config: Config
    summary: Mapping[str, Any]
    """the content of summary.json; empty while the run is unfinished"""
    place: Path | None = None
    """the folder of runs, or the table of results, that contains the run"""
    folder: Path | None = None
    """the run folder; None for a line of a table of results"""
    of_search: bool = False
    """whether it is the full-precision network that a search for bit-widths measured"""

    @property
    def processes(self) -> int:
        """The number of processes that trained the run; 1 while it is unfinished."""
        return processes_of(self.config, self.summary)


def results_table(results: Sequence[Result], beside: Sequence[Result] = ()) -> str:
    """Return a table with a row per run, including its difference from full precision (`against_full_precision`).

    Args:
        results: the runs.
        beside: further full-precision runs that they may be compared with.
    """
    rows = []
    pairs = zip(_told_apart(results), _with_differences(results, beside), strict=True)
    for words, (result, difference) in pairs:
        s = result.summary
        rows.append(
            (
                *words,
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
    groups = _over_seeds(results, beside)
    for words, (runs, found) in zip(_told_apart([runs[0] for runs, _ in groups]), groups, strict=True):
        gap = of_some(mean_and_deviation(found, "+"), len(found), len(runs))
        rows.append((*words, len(runs), mean_and_deviation([score(run.summary) for run in runs]), gap))
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
    network that it starts from: as evaluated by a run, as validated by the run whose checkpoint it is, or as measured
    by a search for bit-widths. Runs that share everything but method, bits, seed and weights all use the same one of
    these two kinds: the closest kind that all of them have, or else the kind that most have; runs without it get None.

    If several full-precision runs compute the same, the one in the run's own folder or table counts. If none is
    there, their results have to agree; otherwise the run gets None.

    Args:
        results: of all runs.
        baselines: `full_precision_of(results)`, if it is known already.
    """
    return [
        None if baseline is None else _difference(result, results[baseline])
        for result, baseline in zip(results, baselines or full_precision_of(results), strict=True)
    ]


def _difference(result: Result, baseline: Result) -> float | None:
    """Return a result minus that of its baseline, which is the best one of training if the run starts from best.pt."""
    own = score(result.summary)
    if _start_in_words(result.config) != (_name(baseline), BEST_CHECKPOINT):
        return own - score(baseline.summary)
    best = baseline.summary.get(f"best_{metric(baseline.summary)}")
    return None if best is None else own - best


def full_precision_of(results: Sequence[Result]) -> list[int | None]:
    """Return the index of the full-precision run that each run is compared with, see `against_full_precision`."""
    found: dict[str, list[int]] = {}
    compared: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        if not result.config.quantization.full_precision:
            compared.setdefault(_comparison(result), []).append(index)
            continue
        for key in _keys(result):
            found.setdefault(key, []).append(index)
    chosen: list[int | None] = [None] * len(results)
    for some in compared.values():
        kinds = zip_longest(*(_baselines(results[index]) for index in some), fillvalue=())
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


def _comparison(result: Result) -> str:
    """Return a key that quantized runs share if they differ only in method, bits, seed and weights."""
    same = _in_full_precision(result.config)
    recipe = replace(same.recipe, batchnorm_batches=0)
    return f"{run_name(replace(same, recipe=recipe, seed=0, weights=None))}, {result.processes} processes"


def _in_full_precision(config: Config) -> Config:
    """Return the config of a quantized run without quantization and everything that depends on it."""
    recipe = replace(config.recipe, distill=Distill.none, teacher=None)
    return replace(config, **in_full_precision() | without_choice() | {"policy": None}, recipe=recipe)


def _baselines(result: Result) -> list[tuple[str, ...]]:
    """Return keys of the full-precision runs that a quantized run may be compared with, by kind, the closest first."""
    config, same = result.config, _in_full_precision(result.config)
    trained: list[tuple[str, ...]] = [
        (_trained(same, result.processes),),
        (_trained(replace(same, recipe=replace(same.recipe, batchnorm_batches=0)), result.processes),),
    ]
    if config.weights is None:
        return trained
    start = _key(replace(same, mode=Mode.evaluate))
    beside = [_key(baseline_of(config))] if config.weights == BASELINE else _checkpoint_of_run(result)
    return [*trained, (start, *beside, _searched(start))]


def _checkpoint_of_run(result: Result) -> list[str]:
    """Return the keys of the full-precision run whose last or best checkpoint a run starts from.

    The run lies in the same folder of runs. If its folder does not have the name that `qat-run` gives, which is unique
    to its config, the checkpoint in it has to have the content that the run started from.
    """
    config, (name, file) = result.config, _start_in_words(result.config)
    if config.weights is None or file not in (LAST_CHECKPOINT, BEST_CHECKPOINT) or result.place is None:
        return []
    keys = [_with_checkpoint(result, name, named=True)]
    path = RunFolder(result.place / name).checkpoints / file
    if path.is_file() and fingerprint(str(path)) == config.content(config.weights):
        keys.append(_with_checkpoint(result, name, named=False))
    return keys


def _start_in_words(config: Config) -> tuple[str, str]:
    """Return the name of the run folder and the name of the checkpoint in it that a run starts from; empty if it starts
    from anything else."""
    path = Path(config.weights or "")
    return (path.parts[-3], path.name) if path.parts[-2:-1] == (CHECKPOINTS,) and len(path.parts) > 2 else ("", "")


def _name(result: Result) -> str:
    """Return the name of the run folder; of a line of a table of results, the name that `qat-run` gives."""
    return run_name(result.config) if result.folder is None else result.folder.resolve().name


def _with_checkpoint(result: Result, name: str, named: bool) -> str:
    """Return a key of the full-precision run with a name in a folder of runs that validates as a run does.

    Args:
        result: a run in this folder.
        name: the name of the full-precision run.
        named: whether this is the name that `qat-run` gives it.
    """
    same = _in_full_precision(result.config)
    validated = _key(replace(same, mode=Mode.evaluate, weights=None, weights_part=None))
    return f"{validated} of {result.place}/{name}{'' if named else ', by content'}"


def _keys(result: Result) -> list[str]:
    """Return the keys that a full-precision run is found by."""
    key = _key(result.config)
    if result.of_search:
        return [_searched(key)]
    if not result.config.training:
        return [key, _trained(result.config, result.processes)]
    name = _name(result)
    checkpoint = _with_checkpoint(result, name, named=name == run_name(result.config))
    return [key, _trained(result.config, result.processes), checkpoint]


def _searched(key: str) -> str:
    return f"{key}, in a search"


def _trained(config: Config, processes: int) -> str:
    """Return the key of a full-precision run that was trained by a number of processes."""
    return f"{_key(config)}, {processes} processes"


def _key(config: Config) -> str:
    """Return a key that full-precision runs share if they compute the same, whatever their quantization keys."""
    config = replace(config, backend="auto", log_excess_mse=False)
    if config.mode == Mode.evaluate:
        config = replace(config, limit_train_batches=None, sync_batchnorm=False, compile=False)  # keys of training
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
    groups: dict[tuple[str, int], dict[int, tuple[Result, float | None]]] = {}
    for result, difference in _with_differences(results, beside):
        seeds = groups.setdefault((run_name(replace(result.config, seed=0)), result.processes), {})
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


def _told_apart(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Return the cells of `_words` of each run. Where they are the same for runs that differ in more than their seed,
    the cell of the clipping method has the keys in which these differ."""
    theirs = [settings_of(result._replace(config=replace(result.config, seed=0))) for result in results]
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result, setting in zip(results, theirs, strict=True):
        alike.setdefault(_words(result), []).append(setting)
    keys = {words: keys_that_differ(some) for words, some in alike.items()}
    rows = []
    for result, setting in zip(results, theirs, strict=True):
        *where, clipping, gradient = words = _words(result)
        said = [in_words(key, setting[key]) for key in keys[words] if setting.get(key, []) != []]
        rows.append((*where, ", ".join(dict.fromkeys([clipping, *said])), gradient))
    return rows


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
