"""Runs that are set side by side: which are seeds of one method, and which methods can be compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from qat_runner.config import Config, Mode, clipping_label, gradient_label, load_config, settings
from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.report.page import shown
from qat_runner.report.runs import configs_in
from qat_runner.runs.records import METRICS, SUMMARY, EpochRow, Summary

FULL_PRECISION = "full precision"

OF_A_LINE = ("seed", "weights", "weight_bits", "activation_bits", "budget", "noise_batches")
"""Keys that runs of one method may differ in: it is looked at by bits, and over seeds, each with weights of its own."""

DIGITS_OF_HASH = 8
"""Of the fingerprint of a file, how many are shown."""


class Width(NamedTuple):
    """Bits that methods are compared at."""

    mean: float
    told: str
    """where those of weights and activations differ both, as in 4/8"""


@dataclass(frozen=True)
class Entry:
    """A run that takes part."""

    folder: Path
    config: Config
    summary: Summary | None
    """None while it is not finished"""
    epochs: list[EpochRow]
    variant: str = ""
    """how it differs from other runs of its method, in more than bits and seed"""

    @property
    def full_precision(self) -> bool:
        return self.config.quantization.full_precision

    @property
    def method(self) -> str:
        """Clipping, gradient and variant, in a few words. Runs that share it differ in bits and seed at most."""
        return ", ".join(filter(None, (FULL_PRECISION if self.full_precision else self._clipping(), self.variant)))

    def _clipping(self) -> str:
        config = self.config
        gradient = "" if config.clipping.learned or config.gradient.name == "mph" else gradient_label(config)
        beside = ["chosen bits"] if config.allocating else [word for word in config.told_remedies if word == "mixed"]
        distilled = "distilled" if config.distilling else ""
        return ", ".join(filter(None, [clipping_label(config), gradient, *beside, *config.remedies, distilled]))

    @property
    def network(self) -> tuple[str, str]:
        return self.config.model.name, self.config.dataset.name

    @property
    def bits(self) -> Width | None:
        """Of weights and activations; where they are chosen, what they may be, or what they came to in the mean.

        None: they are to be chosen, and are not yet.
        """
        if not self.config.allocating:
            return Width((self.config.weight_bits + self.config.activation_bits) / 2, str(self.config.told_bits))
        mean = self.config.limits.get("budget") or self._mean_bits()
        return None if mean is None else Width(mean, f"{mean:g}")

    def _mean_bits(self) -> float | None:
        recorded: Mapping[str, Any] = self.summary or {}
        means = [recorded.get(key) for key in ("mean_weight_bits", "mean_activation_bits")]
        known = [mean for mean in means if mean is not None]
        return round(sum(known) / len(known), 1) if known else None

    @property
    def told_bits(self) -> str:
        """Its bits in words: "4 bits", "4/8 bits", "budget=4"."""
        return str(self.config.told_bits) if self.config.allocating else f"{self.config.told_bits} bits"


def entries(places: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """The runs at the places, or in them where these are folders of runs, each once; and why others are left out.

    Raises:
        ConfigError: a place that holds no run, or fewer than two runs in all.
    """
    found: dict[Path, Entry] = {}
    left_out: list[str] = []
    for place in places:
        config = load_config(place)
        configs, unreadable = configs_in(place) if config is None else ({place: config}, [])
        left_out += map(str, unreadable)
        if not configs and not unreadable:
            raise ConfigError(f"{place}: holds no run of qat-run")
        for folder, config in configs.items():
            try:
                entry = Entry(folder, config, SUMMARY.read(folder), METRICS.read(folder))
            except UnreadableError as error:
                left_out.append(str(error))
            else:
                found[folder.resolve()] = entry
    if len(found) < 2:
        raise ConfigError("; ".join([f"needs two runs or more, and found {len(found)}", *left_out]))
    return _told_apart(list(found.values())), left_out


def _told_apart(runs: Sequence[Entry]) -> list[Entry]:
    """The runs with their variants, so that what is averaged as seeds of one method is no more than that."""
    alike: dict[tuple[str, ...], list[Entry]] = {}
    for run in runs:
        alike.setdefault((*run.network, run.config.mode, run.method), []).append(run)
    variants: dict[Path, str] = {}
    for some in alike.values():
        theirs = [settings(run.config) for run in some]
        once = len({(run.config.seed, run.bits) for run in some}) == len(some)
        alike_in = [key for key in OF_A_LINE if once or key != "weights"]
        keys = [key for key in keys_that_differ(theirs) if key not in alike_in]
        for run, setting in zip(some, theirs, strict=True):
            told = [f"{key.rpartition('.')[2]}={value_in_words(setting[key])}" for key in keys if key in setting]
            variants[run.folder] = ", ".join(dict.fromkeys(told))
    return [replace(run, variant=variants[run.folder]) for run in runs]


def by_network(runs: Sequence[Entry]) -> dict[str, list[Entry]]:
    """What can be drawn in one chart, the largest first: runs of a network on a data set in a mode, and their start."""
    found: dict[str, list[Entry]] = {}
    for run in runs:
        found.setdefault(", ".join((*run.network, run.config.mode)), []).append(run)
    for some in found.values():
        if not any(run.full_precision for run in some):
            evaluated = [run for run in runs if run.config.mode == Mode.evaluate and run.full_precision]
            some += [run for run in evaluated if run.network == some[0].network]
    several = {name: some for name, some in found.items() if len({run.folder for run in some}) > 1}
    return dict(sorted((several or found).items(), key=lambda item: -len(item[1])))


def by_method(runs: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """The methods, by name, and the runs of each."""

    def method(run: Entry) -> str:
        return run.method

    return [(name, list(some)) for name, some in groupby(sorted(runs, key=method), method)]


def measure_of(runs: Sequence[Entry]) -> Measure:
    """What counts for runs on one data set."""
    return runs[0].config.task.measure


def keys_that_differ(some: Sequence[dict[str, Any]]) -> list[str]:
    """Of settings, those that are not the same in all."""
    keys = dict.fromkeys(key for setting in some for key in setting)
    return [key for key in keys if any(setting.get(key) != some[0].get(key) for setting in some)]


def value_in_words(value: Any) -> str:
    """Of a setting; of a fingerprint, the beginning."""
    text = shown(value)
    hashed = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:DIGITS_OF_HASH]}…" if hashed else text
