"""The HTML report of a run: its results, its settings and environment, and the command that repeats it."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from qat_runner.config import Config, Mode, differences, load_config, policy_label
from qat_runner.config.composing import choices, command
from qat_runner.config.tasks import TaskFacts, measure
from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.exporting import export_summary
from qat_runner.report import page
from qat_runner.report.allocation_charts import allocation_charts
from qat_runner.report.oscillation_charts import oscillation_charts
from qat_runner.report.page import Chart, axes, line, number
from qat_runner.report.runs import full_precision_in, full_precision_of_searches
from qat_runner.report.settings import sections
from qat_runner.report.starts import start_of
from qat_runner.report.tables import Result, against_full_precision, full_precision_of
from qat_runner.report.tensor_charts import noise_charts, noisiest, tensor_charts
from qat_runner.runs.files import CsvFile, JsonFile, TextFile
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import (
    ALLOCATION,
    ENVIRONMENT,
    EXPORT,
    HISTOGRAMS,
    LAYERS,
    METRICS,
    OSCILLATIONS,
    QUANTIZERS,
    STEPS,
    SUMMARY,
    Environment,
    EpochRow,
    Session,
    StepRow,
    Summary,
    measured,
    metric,
    score,
    validated,
)
from qat_runner.runs.status import status
from qat_runner.wording import digits, percent

log = logging.getLogger("qat_runner")

T = TypeVar("T")

POINTS = 1000
"""Largest number of points of a curve by step; each point is the mean of the steps that it covers."""


LONGEST_TEXT = 100_000
"""Largest number of characters shown of a text file of the run."""

FEW_LINES = 12
"""A text with at most this many lines is expanded at first; a longer one is collapsed."""


@dataclass(frozen=True)
class Text:
    """The shown part of a text."""

    text: str
    short: bool


@dataclass(frozen=True)
class Card:
    """A key figure at the top of the page."""

    label: str
    value: str
    note: str = ""


def write(folder: Path, out: Path) -> Path:
    """Write the report of a run, finished or not; return its path.

    Args:
        folder: folder of the run.
        out: the file to write.

    Raises:
        ConfigError: the folder holds no run.
    """
    config = load_config(folder)
    if config is None:
        raise ConfigError(f"{folder}: holds no run of qat-run")
    unreadable: list[str] = []

    def read(file: JsonFile[T] | CsvFile[T] | TextFile, place: Path = folder) -> Any:
        try:
            return file.read(place)
        except UnreadableError as error:  # the page shows everything else
            unreadable.append(str(error))
            return None

    summary, environment, epochs = read(SUMMARY), read(ENVIRONMENT), read(METRICS) or []
    rows = read(LAYERS) or []
    curves, noise = _curves(epochs, read(STEPS) or [], config.task), noise_charts(rows)
    one_tensor = tensor_charts(rows, read(HISTOGRAMS) or [])
    oscillations = oscillation_charts(read(OSCILLATIONS) or [])
    exported = read(EXPORT, RunFolder(folder).export)
    allocation = read(ALLOCATION)
    choice = [] if allocation is None else allocation_charts(allocation)
    settings, state = sections(config), status(folder)
    if state.state == "unreadable" and state.note not in unreadable:
        unreadable.append(state.note)
    for why in unreadable:
        log.warning(f"{why}: left out")
    content = {
        "title": folder.resolve().name,
        "heading": heading(config),
        "status": state,
        "broken_off": state.state == "failed",
        "unreadable": unreadable,
        "cards": _cards_so_far(epochs, config) if summary is None else _cards(folder, config, summary),
        "curves": curves,
        "noise": noise,
        "noisiest": noisiest(rows),
        "epoch": rows[-1]["epoch"] if rows else "",
        "quantizers": [] if config.quantization.full_precision else _quantizers(read(QUANTIZERS) or ""),
        "chooses": config.mode == Mode.allocate,
        "one_tensor": one_tensor,
        "oscillations": oscillations,
        "allocation": allocation,
        "choice": choice,
        "why_no_noise": _why_no_noise(config),
        "settings": settings,
        "any_changed": any(row.changed for _, rows in settings for row in rows),
        "choices": " ".join(choices(config)),
        "environment": _environment(environment),
        "resumptions": _resumptions(environment),
        "exported": None if exported is None else export_summary.text(exported),
        **_again(config, environment),
    }
    return page.write(out, "run", [*choice, *curves, *oscillations, *noise, *one_tensor], content)


def _quantizers(text: str) -> list[tuple[str, Text]]:
    """Return the parts of quantizers.txt with headings: the table of the tensors, and the notes below it."""
    table, _, below = text.partition("\n\n")
    parts = {"Tensors and their bits": table, "Quantized share, and what is not quantized": below}
    return [(head, _shown(part.strip("\n"))) for head, part in parts.items() if part.strip()]


def _shown(text: str) -> Text:
    """Return up to LONGEST_TEXT characters of a text, in whole lines and printable characters."""
    whole = text.splitlines()
    lines = "\n".join(text[:LONGEST_TEXT].splitlines()[: None if len(text) <= LONGEST_TEXT else -1])
    printable = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in lines)
    left = len(whole) - len(lines.splitlines())
    return Text(printable + (f"\n... and {left} more lines" if left else ""), len(whole) <= FEW_LINES)


def heading(config: Config) -> str:
    """Describe a run in a few words."""
    how = "in full precision" if config.quantization.full_precision else f"at {config.bits_label} bits"
    if config.allocating:
        how = f"with bits chosen for {config.asked_bits}"
    elif policy := policy_label(config):
        how += f" and {policy}"
    return f"{config.model.name} on {config.dataset.name} {how}"


def _cards(folder: Path, config: Config, summary: Summary) -> list[Card]:
    name = metric(summary)
    highest: Any = summary.get(f"best_{name}")
    figure = measured(summary)
    best = [f"best {figure.describe(highest)}"] if config.training and highest is not None else []
    cards = [Card(name, figure.describe(score(summary)), "; ".join([*best, *_limits(config)]))]
    cards += _against_full_precision(folder, config, summary)
    if not config.quantization.full_precision:
        cards.append(_bits_card(config, summary))
        share = summary.get("quantized_macs")
        if share is not None:
            cards.append(Card("quantized", percent(share / 100, 4), "of the multiply-accumulates"))
        cards.append(Card("clipping", summary["clipping"], f"gradient estimator {summary['gradient']}"))
    if summary["sqnr_db"] is not None:
        cards.append(Card("mean SQNR", f"{summary['sqnr_db']:.1f} dB", "over all quantized tensors"))
    if "oscillating_weights" in summary:
        note = f"of the tracked weights; {percent(summary.get('frozen_weights', 0.0) / 100)} are frozen"
        cards.append(Card("oscillating weights", percent(summary["oscillating_weights"] / 100), note))
    before = summary.get("before_reestimation")
    if before is not None:
        note = f"then re-estimated on {summary.get('batchnorm_batches', 0)} batches"
        cards.append(Card(f"{name} before BatchNorm re-estimation", figure.describe(before), note))
    if "size_mb" in summary:
        small, full = summary["size_mb"], summary["fp32_size_mb"]
        note = f"{digits(full)} MB in fp32, {full / small:.1f} times as large" if small < full else "in fp32"
        cards.append(Card("size", f"{digits(small)} MB", note))
    epochs = f"{summary['epochs']} epochs" if config.training else "validation only"
    cards.append(Card("time", duration(summary["seconds"]), epochs))
    return cards


def _bits_card(config: Config, summary: Summary) -> Card:
    """Return the card with the requested bits and the average bit-width."""
    means = (summary.get("mean_weight_bits"), summary.get("mean_activation_bits"))
    weights, activations = ("-" if mean is None else f"{mean:.2f}" for mean in means)
    if config.allocating:
        return Card("bits", f"{weights}/{activations}", "average of weights / activations, over all quantized tensors")
    label = str(config.bits_label)
    if means != (None, None):
        average = f"on average {weights} (weights), {activations} (activations), over all quantized tensors"
        return Card("bits", label, average)
    return Card("bits", label, "weights / activations" if "/" in label else "")


def _cards_so_far(rows: Sequence[EpochRow], config: Config) -> list[Card]:
    """Return the cards of an unfinished run."""
    cards = [Card("epochs", f"{len(rows)} of {config.epochs}")] if config.training else []
    name = validated(rows[-1]) if rows else None
    if name is not None:
        values = [number(row.get(name)) for row in rows]
        figure = measure(name.removeprefix("val_"))
        note = "; ".join([f"best {figure.describe(figure.best(values))}", *_limits(config)])
        cards.append(Card(f"{figure.name} so far", figure.describe(values[-1]), note))
        cards.append(Card("time", duration(number(rows[-1].get("seconds")))))
    return cards


def _limits(config: Config) -> list[str]:
    """Return notes on the part of the data that was used, if it was not all."""
    trained, validated = config.limit_train_batches if config.training else None, config.limit_val_batches
    return [
        *([] if trained is None else [f"at most {trained} batches per epoch"]),
        *([] if validated is None else [f"at most {validated} validation batches"]),
    ]


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _against_full_precision(folder: Path, config: Config, summary: Summary) -> list[Card]:
    """Return a card with the difference from the full-precision run in the same folder of runs, and its kind.

    Rows of a table all use the same kind of full-precision run, which depends on all rows; this card uses the closest
    kind that this run has.
    """
    if config.quantization.full_precision:
        return []
    place = folder.resolve().parent
    results = [*full_precision_in(place), *full_precision_of_searches(place), Result(config, summary, place, folder)]
    baselines = full_precision_of(results)
    baseline, difference = baselines[-1], against_full_precision(results, baselines)[-1]
    if baseline is None or difference is None:
        return []
    full = results[baseline].config
    alike = full.mode == config.mode and start_of(full) == start_of(config)
    what = "the same run without quantization" if alike else "the network that it starts from"
    return [Card("against fp32", f"{difference:+.2f}", f"{measured(summary).points}; fp32 is {what}")]


def _curves(rows: Sequence[EpochRow], steps: Sequence[StepRow], task: TaskFacts) -> list[Chart]:
    """Return charts of the metrics and the loss by epoch, and of the loss and learning rate by step."""
    charts = []
    if rows:
        splits = [key for key in rows[0] if key.startswith(("val_", "train_"))]
        losses = [key for key in splits if key.endswith("_loss")]
        rates = [key for key in splits if key not in losses and _figure(key) not in task.not_drawn]
        charts.append(_by_epoch("accuracy", task.measure.title, rows, rates, task.dashed))
        charts.append(_by_epoch("loss", "Loss", rows, losses))
    if steps:
        size = -(-len(steps) // POINTS)
        title = f"Training loss by step{f', means of {size}' if size > 1 else ''}"
        charts.append(_by_step("step-loss", title, steps, "loss", size))
        charts.append(_by_step("learning-rate", "Learning rate by step", steps, "lr", size))
    return charts


def _figure(key: str) -> str:
    """val_top1 -> top1"""
    return key.partition("_")[2]


def _by_epoch(
    name: str, heading: str, rows: Sequence[EpochRow], keys: Sequence[str], dashed: Sequence[str] = ()
) -> Chart:
    epochs = [int(number(row["epoch"])) for row in rows]
    ticks = {"dtick": 1} if len(epochs) <= page.FEW_EPOCHS else {}
    keys = sorted(keys, reverse=True)  # validation first, so that it gets the first colour
    traces = [
        line(epochs, [number(row[key]) for row in rows], key.replace("_", " "), int(key.startswith("train")))
        for key in keys
    ]
    for trace, key in zip(traces, keys, strict=True):
        if _figure(key) in dashed:
            trace["line"]["dash"] = "dot"
    return Chart(name, heading, [page.View("", traces)], axes("epoch", xaxis=ticks, hovermode="x unified"))


def _by_step(name: str, heading: str, steps: Sequence[Mapping[str, Any]], key: str, size: int) -> Chart:
    """Return a chart of a column of steps.csv, averaged over `size` rows per point."""
    values = [number(row[key]) for row in steps]
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    ends = [min(size * (i + 1), len(values)) for i in range(len(parts))]
    trace = line(ends, [sum(part) / len(part) for part in parts], key, mode="lines")
    trace["line"] = {"width": 1.25}
    layout = axes("step", showlegend=False, yaxis={"exponentformat": "none"})
    return Chart(name, heading, [page.View("", [trace])], layout, height=240)


def _why_no_noise(config: Config) -> str:
    """Return the reason why a run has no recorded noise."""
    if config.quantization.full_precision:
        return "Nothing is quantized in this run."
    if config.noise_batches == 0:
        return "Noise was not measured in this run (noise_batches=0)."
    return "No noise is recorded yet."


def _again(config: Config, environment: Environment | None) -> dict[str, Any]:
    """Return the command that repeats the run, the recorded one, and the directory that the run was started in."""
    recorded = None if environment is None else shlex.join(environment["command"])
    return {
        "command": command(config),
        "recorded": recorded,
        "directory": None if environment is None else environment.get("directory"),
    }


def _environment(environment: Environment | None) -> list[tuple[str, str]]:
    """Return the environment that the run was started in, line by line."""
    if environment is None:
        return []
    machine, git = environment["machine"], environment["git"]
    checkout = "not from a checkout" if git is None else f"{git['commit']} on {git['branch']}"
    return [
        ("started", environment["started"]),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}"),
        ("GPUs", ", ".join(machine["gpus"]) or "none"),
        ("processes", str(environment.get("processes", 1))),
        ("threads", str(machine["torch_threads"])),
        ("code", checkout + (", with uncommitted changes" if git is not None and git["dirty"] else "")),
        ("python", environment["python"]),
        *((name, version) for name, version in environment["packages"].items() if version),
    ]


def _resumptions(environment: Environment | None) -> list[str]:
    """Return when the run was resumed, each with what had changed in the environment."""
    resumptions: list[str] = []
    if environment is None:
        return resumptions
    for session in environment.get("resumed", []):
        changed = [key for part in ("packages", "git", "machine") for key in _changed(environment, session, part)]
        resumptions.append(session["started"] + (f", with different {', '.join(changed)}" if changed else ""))
    return resumptions


def _changed(first: Session, later: Session, part: Literal["packages", "git", "machine"]) -> list[str]:
    old, new = first[part], later[part]
    return differences(old, new) if old and new else [part] if old != new else []
