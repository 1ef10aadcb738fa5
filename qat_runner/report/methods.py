"""Methods beside each other: what each reaches over its seeds, and how far it lies from another one, seed by seed."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError
from qat_runner.report.differences import CONFIDENCE, Differences
from qat_runner.report.entries import Entry, Setting, Width, by_method, by_network, measure_of
from qat_runner.report.runs import Key
from qat_runner.report.tables import Table, against_full_precision, head, mean_and_deviation, of_some
from qat_runner.runs.records import score

USUAL = "octav"
"""The method that others are compared with, where none is named and it is there."""


@dataclass(frozen=True)
class Standing:
    """A method at some bits, for a network on a data set in a mode."""

    network: str
    bits: Width
    method: str
    full_precision: bool
    measure: Measure
    values: Mapping[int, float]
    """what counts, by seed"""
    gaps: Mapping[int, float]
    """to full precision, by seed, of those that have it"""
    reference: str
    """the method that it is compared with; its own name, if it is that one; empty of full precision"""
    differences: Mapping[int, float]
    """to that one at the same bits, by seed, of those that both have"""
    setting: Setting = ()
    """as of its runs"""
    apart: bool = False
    """whether it is compared with one of another setting"""

    @property
    def gap(self) -> Differences:
        """To full precision, over these seeds."""
        return Differences(tuple(self.gaps.values()))

    @property
    def difference(self) -> Differences:
        """To the reference, over these seeds."""
        return Differences(tuple(self.differences.values()))

    @property
    def told(self) -> str:
        """What the difference says, in words."""
        if self.reference in ("", self.method):
            return ""
        return self.difference.told(self.measure.lower_is_better)


def standings(runs: Sequence[Entry], against: str | None = None) -> list[Standing]:
    """The methods of finished runs, by network and bits, the best first.

    Args:
        runs: as `entries` finds them.
        against: the method that others are compared with, see `_going_by`; None: octav, or the first by name. Of one
            that there is in several settings each is compared with that of its own, see `_references`.

    Raises:
        ConfigError: there is no such method, or more than one.
    """
    done = [run for run in runs if run.summary is not None and run.bits is not None]
    quantized = [run for run in done if not run.full_precision]
    named = None if against is None else _going_by(against, quantized)
    gaps = against_full_precision([run.result for run in done])
    gap = {run.key: gap for run, gap in zip(done, gaps, strict=True) if gap is not None}
    return [each for name, some in by_network(done).items() for each in _of_network(name, some, gap, named)]


def _going_by(word: str, runs: Sequence[Entry]) -> Set[str]:
    """The methods that go by a name: all of a kind, one by its whole name, or all of the only kind that begins so.

    Raises:
        ConfigError: there is none, or there are several kinds.
    """
    methods, kinds = {run.method for run in runs}, {run.kind for run in runs}
    begun = [kind for kind in kinds if kind.partition(", ")[0] == word]
    if word not in kinds and word in methods:
        return {word}
    if word not in kinds and len(begun) != 1:
        raise ConfigError(f"--against {word}: must be one of these: {'; '.join(sorted(methods)) or 'there are none'}")
    return {run.method for run in runs if run.kind == (word if word in kinds else begun[0])}


def _usual(runs: Sequence[Entry]) -> Set[str]:
    """The methods of the kind that others are compared with where none is named."""
    kinds = sorted({run.kind for run in runs}, key=lambda kind: (kind.partition(", ")[0] != USUAL, kind))
    return {run.method for run in runs if run.kind in kinds[:1]}


def _references(runs: Sequence[Entry], named: Set[str]) -> dict[str, str]:
    """The method that each is compared with, of those that are named: the one of its own setting, and where that has
    none, or has nothing beside it, the one of most bits and seeds; of several the first by name."""
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
    """A row a method: seeds, mean and deviation, and the differences, with the confidence interval of their mean.

    Args:
        found: as `standings` finds them.
        notes: sentences about what is not in it, to stand under it as well.
    """
    references = list(dict.fromkeys(each.reference for each in found if each.reference))
    bases = [f"vs {references[0]}"] if len(references) == 1 else ["vs the reference", "reference"]
    heads = ["network", "bits", "method", "seeds", head(list(dict.fromkeys(each.measure for each in found))), "vs fp32"]
    cells = [
        [
            *(each.network, each.bits.told, each.method, str(len(each.values))),
            mean_and_deviation(list(each.values.values())),
            of_some(mean_and_deviation(each.gap.values, "+"), len(each.gaps), len(each.values)),
            of_some(str(each.difference), len(each.differences), len(each.values)),
            *([] if len(bases) == 1 else [each.reference]),
            "the reference" if each.method == each.reference else each.told,
        ]
        for each in found
    ]
    return Table("Methods over seeds", [*heads, *bases, "verdict"], cells, [*NOTES, *_other_settings(found), *notes])


def _other_settings(found: Sequence[Standing]) -> list[str]:
    """Sentences where runs differ in more than their method: in what, and which are compared all the same."""
    compared = [each for each in found if each.reference]
    keys = dict.fromkeys(key for each in compared for key, _ in each.setting)
    if len({(each.network, each.setting) for each in compared}) == len({each.network for each in compared}):
        return []
    told = [
        f"Runs differ in more than the method, in {', '.join(keys)}: each row is compared with the reference of its "
        "own settings."
    ]
    apart = dict.fromkeys(f"{each.method}, with {each.reference}" for each in compared if each.apart)
    if apart:
        told.append(f"Across settings, where a row's own have nothing to compare it with: {'; '.join(apart)}.")
    return told


def numbers(found: Sequence[Standing]) -> Table:
    """The same as numbers, to be computed with: of each seed as well, in the order of the seeds."""
    heads = ["network", "bits", "method", "metric", "seeds", "values", "mean", "deviation", "vs_fp32"]
    heads += ["vs_fp32_seeds", "reference", "difference", "difference_seeds", "low", "high", "verdict"]
    cells = [
        [
            *(each.network, each.bits.told, each.method, each.measure.name),
            " ".join(map(str, each.values)),
            " ".join(map(str, each.values.values())),
            *_numbers(tuple(each.values.values())),
            *(*_numbers(each.gap.values)[:1], " ".join(map(str, each.gaps))),
            *(each.reference, *_numbers(each.difference.values)[:1], " ".join(map(str, each.differences))),
            *(("", "") if each.difference.interval is None else map(str, each.difference.interval)),
            each.told,
        ]
        for each in found
    ]
    return Table("Methods over seeds", heads, cells, ())


def _numbers(values: Sequence[float]) -> tuple[str, str]:
    """Mean and standard deviation, where there are as many values as these take."""
    mean = str(statistics.fmean(values)) if values else ""
    return mean, str(statistics.stdev(values)) if len(values) > 1 else ""


NOTES = (
    "Means and standard deviations over seeds. Differences are of runs of one seed, in points; in brackets is the "
    f"{100 * CONFIDENCE:g} % confidence interval of their mean, that of a paired t-test. (n): only n of the seeds "
    "could be paired.",
    "No correction for many comparisons: of twenty rows without any true difference, about one will look different.",
)
"""Sentences under the table."""
