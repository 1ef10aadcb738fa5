"""The ledger: every claim of the paper and every cell of its tables, the runs that test it, and the verdict."""

import math
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qat_runner.config import Config, run_name
from qat_runner.config.composing import command, quoted
from qat_runner.paper.cells import NEAR, Cell, cells_of, estimates
from qat_runner.paper.claims import Claim, Finding, claims
from qat_runner.paper.evidence import FULL_PRECISION, Result, Setup, is_row, repeated, setups_of
from qat_runner.paper.tables import paper
from qat_runner.report.differences import CONFIDENCE, Differences, Verdict
from qat_runner.report.runs import Run, not_finished
from qat_runner.report.starts import start_of
from qat_runner.report.tables import Document, Table, mean_and_deviation, of_some

RULE = (
    "This page sets the paper's claims, in our words, beside what was run here. Runs of smaller networks on smaller "
    "data stand in for the paper's runs: they show whether its findings appear there, too, and say nothing about the "
    "paper's own cells. The commands that reproduce those cells are listed.",
    "Differences are in percentage points (points), between two runs with the same seed that differ only in what is "
    "compared. Runs of two modes may also differ in what the recipe prescribes for each mode, such as the learning "
    "rate; they start from the same weights, unless one is trained from scratch. Full precision is the run without "
    "quantization that is otherwise the same; if there is none, it is the network that was retrained. All seeds use "
    "the same one of the two. Brackets hold the "
    f"{100 * CONFIDENCE:g} % confidence interval of the mean over seeds, by Student's t (a paired t-test).",
    "A statement gives bounds for a difference. It holds if the whole interval lies within the bounds, does not hold "
    "if the whole interval lies outside, and otherwise cannot be told, because the seed-to-seed variation is too "
    "large. One seed decides nothing. By chance alone, at most one statement in twenty is judged wrongly. A claim "
    "holds in a setup if all of its statements hold, and does not hold if one of them does not. The verdict on a "
    "claim is that of all setups that test it; if they differ, it counts the setups with each. A cell of a table "
    f"holds if its difference from full precision is within {NEAR:g} point of the published difference.",
)

WORDS_OF_A_ROW = ("clipping=", "clipping.q=", "gradient=", "bits=", "seed=", "recipe.distill=", "recipe.teacher=")
"""Beginnings of the words in a command that the row of a table, its bits and its seeds determine."""

Findings = dict[Claim, list[Finding]]
Cells = dict[str, list[Cell]]


def ledger(runs: Sequence[Run], errors: Sequence[str] = ()) -> tuple[Document, Table]:
    """Return the ledger as a page, and all of its lines as one table.

    Args:
        runs: of any networks, data and modes; runs that are no row of a table of the paper have no lines.
        errors: reasons why other runs are left out.

    Raises:
        ConfigError: runs that would share a cell differ in more than their seed.
    """
    setups = setups_of(runs)
    found, cells = {claim: claim.findings(setups) for claim in claims()}, cells_of(setups)
    tables = [_overview(found), _setups(setups, _not_counted(runs, errors)), _statements(found)]
    tables += [*(_table(name, some) for name, some in cells.items()), _table6()]
    page = Document("Ledger: the paper, claim by claim and cell by cell", [*RULE, _counts(found, cells)], tables)
    return page, _lines(found, cells)


def _counts(found: Findings, cells: Cells) -> str:
    """Return a sentence with the number of each verdict: from runs, from the project itself, and of cells."""
    runs, own = (
        Counter(claim.verdict(some) for claim, some in found.items() if bool(claim.found) == fixed)
        for fixed in (False, True)
    )
    of_cells = Counter(cell.verdict for some in cells.values() for cell in some)
    return (
        f"{len(found)} claims. {runs.total()} are judged by these runs: {_describe(runs)}. {own.total()} were examined "
        f"by the project itself, independently of these runs: {_describe(own)}. {of_cells.total()} lines are about "
        f"cells, judged by these runs: {_describe(of_cells)}."
    )


def _describe(verdicts: Counter[str]) -> str:
    return "; ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())


# What was run here


def _not_counted(runs: Sequence[Run], errors: Sequence[str]) -> list[str]:
    """Return sentences on the runs that are in no setup, with the reasons."""
    again = [run.text.rstrip(",") for run in repeated(runs)]
    why = [f"Not counted, since the same run is counted already: {', '.join(again)}."] if again else []
    left_out = [f"Left out: {'; '.join(errors)}."] if errors else []
    return [*not_finished(run.folder for run in runs if run.summary is None), *_no_rows(runs), *why, *left_out]


def _no_rows(runs: Sequence[Run]) -> list[str]:
    """Return a sentence that counts the finished runs that are no row of a table, by the beginning of their names."""
    others = [run for run in runs if run.summary is not None and not is_row(run)]
    kinds = Counter(run_name(run.config).rpartition("_seed")[0] for run in others)
    if not kinds:
        return []
    are = "run is" if len(others) == 1 else "runs are"
    named = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    return [f"{len(others)} finished {are} no row of a table, and at most full precision for others: {named}."]


def _setups(setups: Sequence[Setup], not_counted: Sequence[str]) -> Table:
    heads = ["setup", "network", "width", "data", "inputs", "mode", "epochs", "batch", "lr", "seeds", "runs", "command"]
    notes = [
        "The runs of a setup differ only in their row of a table, bits and seed. To repeat a run, append these words "
        "to the command of its setup, as in `qat-run -m ... +row=octav bits=4 seed=0,1,2`. The ledger in CSV lists the "
        "words of each line."
    ]
    if several := [setup.name for setup in setups if len(_starts(setup)) > 1]:
        notes.append(
            f"The runs of {', '.join(several)} start from several weights: the command leaves out `weights=`, and the "
            "words of a line have it, with a semicolon between the words of different weights."
        )
    notes = [*(notes if setups else ["No finished run is a row of a table."]), *not_counted]
    return Table("What was run here", heads, list(map(_setup, setups)), notes)


def _setup(setup: Setup) -> list[str]:
    config = setup.config
    step = [str(config.batch_size), f"{config.lr:g}"] if config.training else ["", ""]
    seeds = ", ".join(map(str, sorted({some.run.seed for some in setup.results})))
    where = [setup.name, setup.model, f"{config.model.width:g}", config.dataset.name, _inputs(config)]
    asked = setup_command(setup)
    text = f"`{asked}`" if asked else "no command of this version gives these runs"
    processes = setup.results[0].run.processes
    text += f" on {processes} processes" if processes > 1 else ""
    return [*where, str(config.mode), _length(config), *step, seeds, str(len(setup.results)), text]


def _inputs(config: Config) -> str:
    data = config.dataset
    if config.task.metric == "top1":
        return f"{data.image_size}x{data.image_size} pixels"
    return f"{data.max_length} tokens" + (f", {data.train_questions} questions" if data.train_questions else "")


def _length(config: Config) -> str:
    if not config.training:
        return "none"
    return f"{config.epochs}" + (f" of {config.limit_train_batches} batches" if config.limit_train_batches else "")


def setup_command(setup: Setup) -> str | None:
    """Return what the commands of a setup's runs share; None if no command of this version gives these runs."""
    text = command(_without_places(setup.config))
    if text is None:
        return None
    left_out = (*WORDS_OF_A_ROW, *(["weights="] if len(_starts(setup)) > 1 else []))
    return shlex.join(word for word in shlex.split(text) if not word.startswith(left_out))


def _without_places(config: Config) -> Config:
    """Return the config with data_dir=/data, and weights in the directory where the command is run."""
    name, prints = _name_of_weights(config), config.fingerprints
    known = {name: prints[config.weights]} if name is not None and config.weights in prints else {}
    return replace(config, data_dir="/data", weights=name, fingerprints=prints | known)


def _name_of_weights(config: Config) -> str | None:
    """Return the name of the weights file that a run starts from; the value of `weights` if that is no file."""
    weights = config.weights
    return weights if weights is None or weights not in config.fingerprints else Path(weights).name


def _starts(setup: Setup) -> dict[str | None, str | None]:
    """Return the names of the weights that a setup's runs start from, by `start_of`; paths if two names are equal."""
    configs = {start_of(some.run.config): some.run.config for some in setup.results}
    names = {start: _name_of_weights(config) for start, config in configs.items()}
    alike = len({*names.values()}) < len(names)
    return {start: config.weights for start, config in configs.items()} if alike else names


def words_of_row(setup: Setup, row: str, bits: int | None) -> str:
    """Return the words that a row of the tables adds to the command of a setup.

    If the setup's runs start from several weights, the words name these, and those of each weights are separated by
    semicolons.
    """
    starts = _starts(setup)
    seeds: dict[str | None, list[int]] = {}
    for seed, some in sorted(setup.cell(row, bits).items()):
        seeds.setdefault(starts[start_of(some.run.config)] if len(starts) > 1 else None, []).append(seed)
    return "; ".join(_words(row, bits, theirs, weights) for weights, theirs in seeds.items())


def _words(row: str, bits: int | None, seeds: Sequence[int], weights: str | None) -> str:
    of_bits = [] if bits is None else [f"bits={bits}"]
    start = [] if weights is None else [f"weights={quoted(weights)}"]
    return shlex.join([f"+row={row}", *of_bits, f"seed={','.join(map(str, seeds))}", *start])


# Claims


def _overview(found: Findings) -> Table:
    cells = [
        [claim.id, claim.verdict(findings), claim.says, claim.source, _here(claim)] for claim, findings in found.items()
    ]
    notes = [
        "Claims that runs of table rows cannot test were examined by the project itself: the last column gives the "
        "finding, and the command that shows the same for other networks. The statements below decide the other claims."
    ]
    return Table("Claims in words", ["claim", "verdict", "the paper says", "source", "finding"], cells, notes)


def _here(claim: Claim) -> str:
    shown = f"(`{claim.see}`)" if claim.see else ""
    return f"{claim.found.says} {shown}".strip() if claim.found else ""


def _statements(found: Findings) -> Table:
    heads = ["claim", "statement", "published", "setup", "here", "seeds", "verdict"]
    cells = []
    for claim, findings in found.items():
        for statement in claim.statements:
            published = _range(claim.published(statement).values())
            cells += [
                [claim.id, f.text, published, f.setup.name, *_difference(f.differences), str(f.verdict)]
                for f in findings
                if f.statement == statement
            ] or [[claim.id, statement.text(), published, "", "", "0", str(Verdict.NOT_RUN)]]
    notes = ["Published: the same difference in the paper's tables, from the smallest to the largest of its networks."]
    return Table("Claims, statement by statement", heads, cells, notes)


def _difference(gap: Differences) -> list[str]:
    return [str(gap), str(len(gap.values))]


def _range(values: Collection[float]) -> str:
    ends = dict.fromkeys(f"{end:+.2f}" for end in (min(values), max(values))) if values else {}
    return " to ".join(ends)


# Cells


def _table(name: str, cells: Sequence[Cell]) -> Table:
    metric = paper()[name].get("metric", "top1")
    heads = [
        "network",
        "bits",
        "method",
        f"published {metric} %",
        "vs full precision",
        "setup",
        f"{metric} % here",
    ]
    heads += ["vs full precision, here", "seeds", "verdict", "GPU hours (paper)", "command (paper)"]
    facts = estimates()
    speeds = ", ".join(f"{model} {speed}" for model, speed in facts["samples_per_second"].items())
    notes = [
        f"GPU hours are an estimate for {facts['gpu']}, assumed to train this many samples per second: {speeds}; with "
        f"the paper's epochs, and {facts['quantized']:g} times the time for quantized runs. None of it was measured. "
        "The estimate assumes mixed precision, which needs `amp=bf16` in the commands; the default is `amp=none`."
    ]
    return Table(f"{name}: {paper()[name]['title']}", heads, list(map(_cell, cells)), notes)


def _cell(cell: Cell) -> list[str]:
    gap = cell.published_gap
    said = [f"{cell.published:.2f}", "" if gap is None else f"{gap:+.2f}"]
    here = [
        "" if cell.setup is None else cell.setup.name,
        mean_and_deviation([some.value for some in cell.results.values()]),
    ]
    gap_here = of_some(str(cell.gap), len(cell.gap.values), len(cell.results))
    differences = [gap_here, str(len(cell.results)), cell.verdict]
    of_row = [cell.model, str(cell.bits or 32), str(paper()["labels"][cell.row])]
    return [*of_row, *said, *here, *differences, _hours(cell), f"`{cell.command}`"]


def _hours(cell: Cell) -> str:
    return f"{cell.gpu_hours:.0f}" if cell.gpu_hours >= 10 else f"{cell.gpu_hours:.1f}"


def _table6() -> Table:
    cells = [
        [
            kind,
            paper()["labels"][f"static_{method}"],
            str(known["tensors"]),
            *map(str, known[method]),
            "see `qat-report table6`",
        ]
        for kind, known in paper()["table6"].items()
        for method in ("octav", "mse_sweep")
    ]
    heads = ["tensors", "method", "count", "published seconds per tensor", "published seconds in total", "verdict"]
    notes = ["Seconds depend on the machine: the command times both methods on one machine and prints their ratio."]
    return Table("table6: Seconds to calibrate BERT-Base", heads, cells, notes)


# All lines as one table


def _lines(found: Findings, cells: Cells) -> Table:
    rows = [row for claim, findings in found.items() for row in _lines_of_claim(claim, findings)]
    rows += [_line_of_cell(cell) for some in cells.values() for cell in some]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    return Table("ledger", heads, [[row.get(key, "") for key in heads] for row in rows], [])


def _lines_of_claim(claim: Claim, findings: Sequence[Finding]) -> list[dict[str, str]]:
    verdict = claim.verdict(findings)
    first = {"source": claim.source, "entry": claim.id, "says": claim.says, "verdict_of_claim": verdict}
    if not findings:
        return [first | {"verdict": verdict}]
    return [
        {
            **first,
            **_line_of_setup(f.setup, f.statement.of, f.statement.bits, f.setup.cell(f.statement.of, f.statement.bits)),
            "minus": " ".join(filter(None, [f.statement.minus, f.statement.minus_mode])),
            "minus_setup": f.other.name if f.other else "",
            "above": f"{f.statement.above:g}" if math.isfinite(f.statement.above) else "",
            "below": f"{f.statement.below:g}" if math.isfinite(f.statement.below) else "",
            "published_difference": _range(claim.published(f.statement).values()),
            **_numbers(f.differences),
            "verdict": str(f.verdict),
        }
        for f in findings
    ]


def _line_of_cell(cell: Cell) -> dict[str, str]:
    gap, ends = cell.published_gap, cell.ends
    return {
        "source": cell.table,
        "entry": cell.name,
        "published": f"{cell.published:.2f}",
        **({"seeds": "0"} if cell.setup is None else _line_of_setup(cell.setup, cell.row, cell.bits, cell.results)),
        **({} if ends is None else {"minus": FULL_PRECISION, "above": f"{ends[0]:.2f}", "below": f"{ends[1]:.2f}"}),
        "published_difference": "" if gap is None else f"{gap:+.2f}",
        **_numbers(cell.gap),
        "verdict": cell.verdict,
        "own_gpu_hours": _hours(cell),
        "own_command": cell.command,
    }


def _line_of_setup(setup: Setup, row: str, bits: int | None, results: Mapping[int, Result]) -> dict[str, str]:
    return {
        "setup": setup.name,
        "network": setup.model,
        "data": setup.config.dataset.name,
        "inputs": _inputs(setup.config),
        "epochs": _length(setup.config),
        "words": words_of_row(setup, row, bits),
        "values": " ".join(f"{results[seed].value:.2f}" for seed in sorted(results)),
        "seeds": str(len(results)),
    }


def _numbers(gap: Differences) -> dict[str, str]:
    low, high = ("", "") if gap.interval is None else (f"{end:+.2f}" for end in gap.interval)
    return {
        "difference": f"{gap.mean:+.2f}" if gap.values else "",
        "difference_seeds": str(len(gap.values)),
        "low": low,
        "high": high,
    }
