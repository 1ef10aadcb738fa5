"""Runs that are compared: which runs are seeds of one method, and which methods can be compared."""

import os
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from qat_runner.config import LIMITS, Config, Mode, clipping_label, gradient_label, load_config, policy_label
from qat_runner.config.composing import quoted
from qat_runner.config.identities import OPTIONS_OF_LABEL
from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.quant.limits import with_options
from qat_runner.report.differing import (
    differing_keys,
    in_words,
    keys_that_differ,
    processes_of,
    settings_of,
    value_in_words,
)
from qat_runner.report.results import results_and_errors
from qat_runner.report.runs import (
    Key,
    by_precedence,
    configs_in,
    full_precision_of_searches,
    key_of,
    place_of,
    recipe_of,
    selected,
)
from qat_runner.report.starts import each_seed_has_its_own, start_of
from qat_runner.report.tables import Result, against_full_precision, full_precision_of
from qat_runner.runs.records import ENVIRONMENT, METRICS, SUMMARY, EpochRow, Summary

FULL_PRECISION = "full precision"

OF_A_CELL = ("seed", "weight_bits", "activation_bits", *LIMITS, "max_drop")
"""Keys that runs of one method may differ in: bits, limits on chosen bits, and the seed."""

OF_A_LINE = (*OF_A_CELL, "noise_batches")
"""The same if no two runs of the method that share bits and seed differ in noise_batches: it may vary with the bits."""

PLACE = "folder"
"""Used in place of a key for runs that differ only in their location."""

RULES = "rules"
"""The key of rules, which the name of a method shows by a hash and `rules_in_words` in full."""

Setting = tuple[tuple[str, str], ...]
"""Keys in which compared methods differ but should not, each with its text: ("lr", "lr=0.1")."""


class Width(NamedTuple):
    """Bits at which methods are compared."""

    mean: float
    text: str
    """text: weights/activations if they differ, as in 4/8; the limit if bits are chosen, as in size_mb=2"""


@dataclass(frozen=True)
class Entry:
    """A run in a comparison."""

    folder: Path
    """for a line of a table of results: the file"""
    config: Config
    summary: Summary | None
    """None while the run is unfinished"""
    epochs: list[EpochRow]
    variant: str = ""
    """text of the differences from other runs of the method besides bits and seed, and from other methods' runs"""
    setting: Setting = ()
    """the part of these differences that does not belong to the method"""
    came_to: float | None = None
    """average bit-width over all runs of the network whose bits were chosen within the same limits; None if there are
    none yet, or bits are not chosen"""
    line: int | None = None
    """line in a table of results; None for a run folder"""
    processes: int = 1
    """number of processes that trained the run, see `processes_of`; those of the latest start while it is unfinished"""

    @property
    def key(self) -> Key:
        """The unique key of the run, see `key_of`."""
        return key_of(self.folder, self.line)

    @property
    def full_precision(self) -> bool:
        return self.config.quantization.full_precision

    @property
    def method(self) -> str:
        """Clipping, gradient and variant, in a few words. Runs that share it differ at most in bits and seed."""
        return ", ".join(filter(None, (self._kind(policy_label(self.config)), self.variant)))

    @property
    def kind(self) -> str:
        """The method without the variant, and without the hash of its rules: all policies are one kind."""
        return self._kind(policy_label(self.config, hashed=False))

    @property
    def clipping(self) -> str:
        """The clipping method without its options."""
        return clipping_label(self.config)

    def _kind(self, policy: str) -> str:
        if self.full_precision:
            return FULL_PRECISION
        config = self.config
        gradient = "" if config.clipping.learned or gradient_label(config) == "mph" else gradient_label(config)
        distilled = "distilled" if config.distilling else ""
        method = config.clipping_in_mode.method
        known = {name: value for name, value in method.options.items() if name in OPTIONS_OF_LABEL}
        clipping = with_options(self.clipping, method, known | config.clipping_of_mode)
        return ", ".join(filter(None, [clipping, gradient, policy, *config.remedies, distilled]))

    @property
    def result(self) -> Result:
        folder = self.folder if self.line is None else None
        return Result(self.config, self.summary or {}, place_of(self.key), folder)

    @property
    def network(self) -> tuple[str, str]:
        return self.config.model.name, self.config.dataset.name

    @property
    def bits(self) -> Width | None:
        """The bits of weights and activations; for chosen bits, the budget or the average reached within another limit.

        None if bits are still to be chosen.
        """
        if not self.config.allocating:
            return Width((self.config.weight_bits + self.config.activation_bits) / 2, str(self.config.bits_label))
        if [*self.config.limits] == ["budget"]:
            budget = self.config.limits["budget"]
            return Width(budget, f"{budget:g}")
        return None if self.came_to is None else Width(self.came_to, self.config.asked_bits)

    @property
    def mean_bits(self) -> float | None:
        """The average bit-width of this run."""
        recorded: Mapping[str, Any] = self.summary or {}
        means = [recorded.get(key) for key in ("mean_weight_bits", "mean_activation_bits")]
        known = [mean for mean in means if mean is not None]
        return statistics.fmean(known) if known else None

    @property
    def bits_label(self) -> str:
        """The bits in words: "4 bits", "4/8 bits", "budget=4"."""
        return str(self.config.bits_label) if self.config.allocating else f"{self.config.bits_label} bits"


def entries(
    places: Sequence[Path], dataset: str | None = None, model: str | None = None, tables: bool = True
) -> tuple[list[Entry], list[str]]:
    """Return the runs found at some places, each once, and the reasons why others are left out.

    Args:
        places: run folders, folders of run folders, or tables of results (*.csv files).
        dataset, model: as for `selected`.
        tables: whether to include lines of tables of results, which have no epochs.

    Raises:
        ConfigError: a place does not exist, there is no run of the data set or network, or there are fewer than two.
        UnreadableError: as for `read_results`.
    """
    found: dict[Key, Entry] = {}
    left_out: list[str] = []
    for place in {place.resolve(): place for place in places}.values():
        if tables and place.suffix == ".csv" and place.is_file():
            runs, errors = results_and_errors(place)
            lines = [
                Entry(run.folder, run.config, run.summary, [], line=run.line, processes=run.processes) for run in runs
            ]
            left_out += errors
            found |= {entry.key: entry for entry in lines}
            continue
        configs, unreadable = _configs_at(place, alone=len(places) == 1)
        left_out += unreadable
        for folder, config in configs.items():
            try:
                entry = _entry(folder, config)
            except UnreadableError as error:
                left_out.append(str(error))
            else:
                found[entry.key] = entry
    if len(found) < 2:
        raise ConfigError("; ".join([f"needs at least two runs, found {len(found)}", *left_out]))
    return _labelled_apart(selected(list(found.values()), dataset, model)), left_out


def _entry(folder: Path, config: Config) -> Entry:
    """Return the run in a folder.

    Raises:
        UnreadableError: its records cannot be read.
    """
    summary = SUMMARY.read(folder)
    record: Mapping[str, Any] = summary or {}
    if summary is None:
        with suppress(UnreadableError):
            begun = ENVIRONMENT.read(folder)
            record = {} if begun is None else [begun, *begun.get("resumed", [])][-1]
    return Entry(folder, config, summary, METRICS.read(folder), processes=processes_of(config, record))


def _configs_at(place: Path, alone: bool) -> tuple[dict[Path, Config], list[str]]:
    """Return the run folders at a place, and the reasons why others are left out.

    One of several places may hold no run, since a shell expands runs/* to everything in the folder.

    Raises:
        ConfigError: the place does not exist, or it is the only place and holds no run.
        UnreadableError: the place is the only one and cannot be read.
    """
    try:
        config = load_config(place)
    except UnreadableError as error:
        if alone:
            raise
        return {}, [str(error)]
    configs, unreadable = configs_in(place) if config is None else ({place: config}, [])
    if configs or unreadable:
        return configs, list(map(str, unreadable))
    if not place.exists():
        raise ConfigError(f"{place}: no such folder")
    if alone:
        raise ConfigError(f"{place}: holds no run of qat-run")
    return {}, [f"{place}: holds no run of qat-run"]


def _labelled_apart(runs: Sequence[Entry]) -> list[Entry]:
    """Return the runs with their variants.

    Variants ensure that only seeds of one method are averaged, and that the names of compared methods show whatever
    else the methods differ in.
    """
    compared: dict[tuple[str, ...], list[Entry]] = {}
    runs = _with_chosen_bits(runs)
    for run in runs:
        compared.setdefault((*run.network, run.config.mode), []).append(run)
    labelled: dict[Key, Entry] = {}
    for together in compared.values():
        unlike, methods = _between_methods(together), by_method(together)
        shared = _sets_of_starts([some for _, some in methods])
        for method, some in methods:
            theirs = _with_starts(some, shared.get(method))
            own = [key for key in keys_that_differ(theirs) if key not in _of_seeds(some)]
            keys = dict.fromkeys([*own, *unlike])
            described = [{key: in_words(key, s[key]) for key in keys if s.get(key, []) != []} for s in theirs]
            places = _places(some, [(str(words), *_cell(run)) for run, words in zip(some, described, strict=True)])
            for run, words, (place, name) in zip(some, described, places, strict=True):
                words |= {PLACE: place} if place else {}
                setting = tuple((key, said) for key, said in words.items() if key in (*unlike, PLACE))
                beside = {key: said for key, said in words.items() if key != RULES}  # the policy's hash shows them
                variant = ", ".join(filter(None, [*dict.fromkeys(beside.values()), name]))
                labelled[run.key] = replace(run, variant=variant, setting=setting)
    return [labelled[run.key] for run in runs]


def _with_chosen_bits(runs: Sequence[Entry]) -> list[Entry]:
    """Return the runs with `came_to`, averaged over a network's runs within the same limits: one value per limit."""
    means: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        if run.config.allocating and run.mean_bits is not None:
            means.setdefault((*run.network, run.config.asked_bits), []).append(run.mean_bits)
    return [
        replace(run, came_to=statistics.fmean(means[key]))
        if run.config.allocating and (key := (*run.network, run.config.asked_bits)) in means
        else run
        for run in runs
    ]


def _between_methods(runs: Sequence[Entry]) -> list[str]:
    """Return the keys in which runs of one network, data set and mode differ, but compared methods should not."""
    keys = differing_keys([recipe_of(run) for run in runs])
    started = {(run.config.seed, start_of(run.config)) for run in runs}
    own = len(started) > len({seed for seed, _ in started}) and runs[0].config.mode != Mode.evaluate
    return [*keys, *(["weights"] if own else [])]


def _sets_of_starts(methods: Sequence[Sequence[Entry]]) -> dict[str, str]:
    """Return the methods of which each seed has its own starting weights -> a name of that set of weights.

    Methods share a set, and its name, if none of their seeds starts from different weights; otherwise the names differ
    by the weights of a seed.
    """
    sets: list[dict[int, str | None]] = []
    chosen: dict[str, dict[int, str | None]] = {}
    for some in methods:
        if each_seed_has_its_own(run.config for run in some):
            starts = {run.config.seed: start_of(run.config) for run in some}
            agreeing = (
                known for known in sets if all(known.get(seed, start) == start for seed, start in starts.items())
            )
            known = next(agreeing, None)
            if known is None:
                sets.append(known := {})
            known.update(starts)
            chosen[some[0].method] = known
    alone = len(sets) < 2
    return {
        method: "of each seed" if alone else f"of each seed ({value_in_words(known[min(known)])} for seed {min(known)})"
        for method, known in chosen.items()
    }


def _with_starts(some: Sequence[Entry], shared: str | None) -> list[dict[str, Any]]:
    """Return the settings of a method's runs; if each seed has its own weights, all get the name of their set."""
    starts = [start_of(run.config) for run in some] if shared is None else [shared] * len(some)
    return [
        settings_of(run) | ({} if start is None else {"weights": start})
        for run, start in zip(some, starts, strict=True)
    ]


def _cell(run: Entry) -> tuple[int, str]:
    """Return the seed and the bits of a run."""
    return run.config.seed, run.bits_label


def _of_seeds(some: Sequence[Entry]) -> tuple[str, ...]:
    """Return the keys that seeds and bits of a method may differ in.

    noise_batches may vary with the bits, but not between runs that share bits and seed.
    """
    once = len({(*_cell(run), run.config.noise_batches) for run in some}) == len({_cell(run) for run in some})
    return OF_A_LINE if once else OF_A_CELL


def _places(runs: Sequence[Entry], same: Sequence[Hashable]) -> list[tuple[str, str]]:
    """Return the location that tells each run of a method from the others: its place, and its name in there.

    Args:
        runs: runs of one method.
        same: equal for runs that differ in nothing but their location.

    Returns:
        The place is empty unless equal runs lie in several. The name is that of the run folder, or the line number; it
        is empty for the first of equal runs in a place, by `by_precedence`.
    """
    cells = {run.key: cell for run, cell in zip(runs, same, strict=True)}
    parents = [place_of(run.key) for run in runs]
    shared = len(Path(os.path.commonpath(parents)).parts)
    one = len({*zip(parents, same, strict=True)}) == len({*same})  # no equal runs lie in several places
    first: dict[Hashable, Key] = {}
    for run in by_precedence(runs):
        first.setdefault((place_of(run.key), cells[run.key]), run.key)
    return [
        (
            "" if one else f"in {Path(*parent.parts[shared:])}",
            "" if first[parent, cells[run.key]] == run.key else _name_in_place(run),
        )
        for run, parent in zip(runs, parents, strict=True)
    ]


def _name_in_place(run: Entry) -> str:
    return run.folder.name if run.line is None else f"line {run.line}"


def by_network(runs: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Group runs by network, data set and mode, the largest group first.

    A group also gets the full-precision runs of other modes that its runs are compared with; if full-precision runs of
    several modes are in it, these are named after their mode. A mode that has only such borrowed runs forms no group.
    """
    baselines = full_precision_of([run.result for run in runs])
    baseline = {run.key: runs[i] for run, i in zip(runs, baselines, strict=True) if i is not None}
    found: dict[str, list[Entry]] = {}
    for run in runs:
        found.setdefault(", ".join((*run.network, run.config.mode)), []).append(run)
    lent: set[Key] = set()
    for some in found.values():
        members = {run.key for run in some}
        used = {baseline[run.key].key: baseline[run.key] for run in some if run.key in baseline}
        theirs = {key: run for key, run in used.items() if key not in members}
        lent |= theirs.keys()
        modes = {run.config.mode for run in (*theirs.values(), *(run for run in some if run.full_precision))}
        some += theirs.values() if len(modes) < 2 else map(_with_mode, theirs.values())
    own = {name: some for name, some in found.items() if not {run.key for run in some} <= lent}
    return dict(sorted(own.items(), key=lambda item: -len(item[1])))


def gaps_of(runs: Iterable[Entry]) -> dict[Key, float]:
    """Return the differences of finished runs from full precision, for those that have it: from one of the runs, or
    from the network that a search for bit-widths in the same folder of runs measured."""
    done = [run for run in runs if run.summary is not None]
    places = dict.fromkeys(place_of(run.key) for run in done)
    searches = [result for place in places for result in full_precision_of_searches(place)]
    found = against_full_precision([*(run.result for run in done), *searches])
    return {run.key: gap for run, gap in zip(done, found, strict=False) if gap is not None}


def _with_mode(run: Entry) -> Entry:
    """Return a run whose method names its mode, so that it is not averaged with runs of another mode."""
    return replace(run, variant=", ".join(filter(None, (str(run.config.mode), run.variant))))


def by_method(runs: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """Return the methods, sorted by name, with the runs of each."""

    def method(run: Entry) -> str:
        return run.method

    return [(name, list(some)) for name, some in groupby(sorted(runs, key=method), method)]


def measure_of(runs: Sequence[Entry]) -> Measure:
    """Return the metric of runs on one data set."""
    return runs[0].config.task.measure


def unplaced(runs: Iterable[Entry]) -> list[str]:
    """Return a sentence for each finished run that has no place in a comparison, with the reason."""
    why = "does not record the average bit-width that was chosen"
    return [f"{run.folder}: {why}" for run in runs if run.summary is not None and run.bits is None]


def rules_in_words(runs: Iterable[Entry]) -> list[str]:
    """Return a sentence for each set of rules that names of methods show by a hash: the rules in full, as in a command,
    and the average bit-widths that they lead to, for each network and bit-width of the other tensors."""
    found: dict[str, list[Entry]] = {}
    for run in runs:
        if run.config.rules and not run.full_precision:
            found.setdefault(policy_label(run.config), []).append(run)
    return [f"{name}{_mean_bits(some)}: `rules={quoted(some[0].config.rules)}`" for name, some in found.items()]


def _mean_bits(runs: Sequence[Entry]) -> str:
    """Return the average bit-widths of runs, in parentheses; if they differ, with the network and `bits` of each."""
    found: dict[str, str] = {}
    for run in runs:
        recorded: Mapping[str, Any] = run.summary or {}
        means = {what: recorded.get(f"mean_{what}_bits") for what in ("weight", "activation")}
        known = [f"{mean:.2f} {what} bits" for what, mean in means.items() if mean is not None]
        if known:
            found[f"{run.config.model.name} at {run.bits_label}"] = f"{' and '.join(known)} on average"
    if len({*found.values()}) > 1:
        return f" ({'; '.join(f'{where}: {means}' for where, means in found.items())})"
    return "".join(f" ({means})" for means in dict.fromkeys(found.values()))
