"""Comparison of methods: the mean of each over its seeds, and its difference from a reference, paired by seed."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError
from qat_runner.report.differences import CONFIDENCE, Differences
from qat_runner.report.entries import Entry, Setting, Width, by_method, by_network, gaps_of, measure_of
from qat_runner.report.runs import Key
from qat_runner.report.tables import Table, head, mean_and_deviation, of_some
from qat_runner.runs.records import score

USUAL = "octav"
"""The default reference method, if there are runs of it."""


@dataclass(frozen=True)
class Standing:
    """The results of a method at some bits, for one network, data set and mode."""

    network: str
    bits: Width
    method: str
    full_precision: bool
    measure: Measure
    values: Mapping[int, float]
    """the metric that counts, by seed"""
    gaps: Mapping[int, float]
    """difference from full precision, by seed, for seeds that have it"""
    reference: str
    """the method that this one is compared with; its own name if it is the reference; empty for full precision"""
    differences: Mapping[int, float]
    """difference from the reference at the same bits, by seed, for seeds that both have"""
    setting: Setting = ()
    """the setting of the method's runs, see `Entry`"""
    apart: bool = False
    """whether the reference has another setting"""

    @property
    def gap(self) -> Differences:
        """Differences from full precision over the seeds."""
        return Differences(tuple(self.gaps.values()))

    @property
    def difference(self) -> Differences:
        """Differences from the reference over the seeds."""
        return Differences(tuple(self.differences.values()))

    @property
    def text(self) -> str:
        """The verdict on the difference from the reference, in words."""
        if self.reference in ("", self.method):
            return ""
        return self.difference.describe(self.measure.lower_is_better)


def standings(runs: Sequence[Entry], against: str | None = None) -> list[Standing]:
    """Return the standings of the methods of finished runs, by network and bits, the best first.

    Args:
        runs: as `entries` returns them.
        against: the reference method, see `_going_by`; None: octav, or else the first by name. If the reference has
            runs in several settings, each method is compared with the one of its own setting, see `_references`.

    Raises:
        ConfigError: no method matches `against`, or several do.
    """
    done = [run for run in runs if run.summary is not None and run.bits is not None]
    quantized = [run for run in done if not run.full_precision]
    named = None if against is None else _going_by(against, quantized)
    gap = gaps_of(done)
    return [each for name, some in by_network(done).items() for each in _of_network(name, some, gap, named)]


def _going_by(word: str, runs: Sequence[Entry]) -> Set[str]:
    """Return the methods that a name refers to: all of a kind, one by its full name, or all of the only kind that
    begins with it.

    Raises:
        ConfigError: no kind matches, or several do.
    """
    methods, kinds = {run.method for run in runs}, {run.kind for run in runs}
    begun = sorted({run.kind for run in runs if run.clipping == word or run.kind.startswith(f"{word}, ")})
    if word not in kinds and word in methods:
        return {word}
    if word not in kinds and len(begun) != 1:
        raise ConfigError(f"--against {word}: must be one of these: {'; '.join(sorted(methods)) or '(no methods)'}")
    return {run.method for run in runs if run.kind == (word if word in kinds else begun[0])}


def _usual(runs: Sequence[Entry]) -> Set[str]:
    """Return the methods of the kind that serves as reference by default."""
    first = min(((run.clipping != USUAL, run.kind) for run in runs), default=None)
    return {run.method for run in runs if (run.clipping != USUAL, run.kind) == first}


def _references(runs: Sequence[Entry], named: Set[str]) -> dict[str, str]:
    """Return the reference of each method, one of those that are named.

    It is the one with the method's own setting. If that setting has none, or no other method, it is the one with the
    most bits and seeds; ties go to the first by name.
    """
    settings = {run.method: run.setting for run in runs}
    cells = Counter(method for method, *_ in {(run.method, run.bits, run.config.seed) for run in runs})

    def most(methods: Set[str]) -> str:
        return max(sorted(methods), key=lambda method: cells[method], default="")

    anywhere = most(named & settings.keys() or named)
    together = {setting: {m for m in settings if settings[m] == setting} for setting in settings.values()}
    own = {setting: most(named & some) for setting, some in together.items() if len(some) > 1}
    return {method: own.get(setting) or anywhere for method, setting in settings.items()}


def _of_network(
    name: str, runs: Sequence[Entry], gaps: Mapping[Key, float], named: Set[str] | None
) -> Iterator[Standing]:
    measure = measure_of(runs)
    quantized = [run for run in runs if not run.full_precision]
    references = _references(quantized, _usual(quantized) if named is None else named)
    settings = {run.method: run.setting for run in runs}
    for bits in sorted({run.bits for run in runs if run.bits is not None}):
        here = by_method(run for run in runs if run.bits == bits)
        values = {method: {r.config.seed: score(r.summary or {}) for r in some} for method, some in here}
        ranked = sorted(here, key=lambda pair: _mean(values[pair[0]]), reverse=not measure.lower_is_better)
        for method, some in ranked:
            mine, full, reference = values[method], some[0].full_precision, references.get(method, "")
            base = {} if method == reference else values.get(reference, {})
            yield Standing(
                *(name, bits, method, full, measure, mine),
                gaps={run.config.seed: gaps[run.key] for run in some if run.key in gaps},
                reference=reference,
                differences={seed: mine[seed] - base[seed] for seed in mine if seed in base},
                setting=settings[method],
                apart=settings.get(reference, settings[method]) != settings[method],
            )


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)


def table(found: Sequence[Standing], notes: Sequence[str] = ()) -> Table:
    """Return a table with a row per method: seeds, mean and standard deviation, and differences with their interval.

    Args:
        found: as `standings` returns them.
        notes: further sentences to print below the table.
    """
    references = list(dict.fromkeys(each.reference for each in found if each.reference))
    bases = [f"vs {references[0]}"] if len(references) == 1 else ["vs the reference", "reference"]
    heads = ["network", "bits", "method", "seeds", head(list(dict.fromkeys(each.measure for each in found))), "vs fp32"]
    cells = [
        [
            *(each.network, each.bits.text, each.method, str(len(each.values))),
            mean_and_deviation(list(each.values.values())),
            of_some(mean_and_deviation(each.gap.values, "+"), len(each.gaps), len(each.values)),
            of_some(str(each.difference), len(each.differences), len(each.values)),
            *([] if len(bases) == 1 else [each.reference]),
            "the reference" if each.method == each.reference else each.text,
        ]
        for each in found
    ]
    lines = [*_notes(found), *_other_settings(found), *notes]
    return Table("Methods over seeds", [*heads, *bases, "verdict"], cells, lines)


def _notes(found: Sequence[Standing]) -> list[str]:
    """Return the sentences that explain the columns."""
    units = " or ".join(dict.fromkeys(each.measure.points for each in found))
    return [
        "Means and standard deviations over seeds. Differences are taken between runs with the same seed, in "
        f"{units}; brackets hold the {100 * CONFIDENCE:g} % confidence interval of their mean, by a paired t-test. (n) "
        "means that only n of the seeds could be paired.",
        "There is no correction for multiple comparisons: of twenty rows without a true difference, about one will "
        "look different.",
    ]


def _other_settings(found: Sequence[Standing]) -> list[str]:
    """Return sentences on runs that differ in more than their method: the keys, and the comparisons across settings."""
    compared = [each for each in found if each.reference]
    keys = dict.fromkeys(key for each in compared for key, _ in each.setting)
    if len({(each.network, each.setting) for each in compared}) == len({each.network for each in compared}):
        return []
    notes = [
        f"Runs differ in more than the method, namely in {', '.join(keys)}. Each row is compared with the reference "
        "that has the same settings."
    ]
    apart = dict.fromkeys(f"{each.method}, with {each.reference}" for each in compared if each.apart)
    if apart:
        notes.append(
            f"Compared with a reference of other settings, since there is none of the same: {'; '.join(apart)}."
        )
    return notes


def numbers(found: Sequence[Standing]) -> Table:
    """Return the same as plain numbers to compute with, including the values of each seed, in the order of seeds."""
    heads = ["network", "bits", "method", "metric", "seeds", "values", "mean", "deviation", "vs_fp32"]
    heads += ["vs_fp32_seeds", "reference", "difference", "difference_seeds", "low", "high", "verdict"]
    cells = [
        [
            *(each.network, each.bits.text, each.method, each.measure.name),
            " ".join(map(str, each.values)),
            " ".join(map(str, each.values.values())),
            *_numbers(tuple(each.values.values())),
            *(*_numbers(each.gap.values)[:1], " ".join(map(str, each.gaps))),
            *(each.reference, *_numbers(each.difference.values)[:1], " ".join(map(str, each.differences))),
            *(("", "") if each.difference.interval is None else map(str, each.difference.interval)),
            each.text,
        ]
        for each in found
    ]
    return Table("Methods over seeds", heads, cells, ())


def _numbers(values: Sequence[float]) -> tuple[str, str]:
    """Return mean and standard deviation as text; empty if there are too few values."""
    mean = str(statistics.fmean(values)) if values else ""
    return mean, str(statistics.stdev(values)) if len(values) > 1 else ""
