"""Methods beside each other: what each reaches over its seeds, and how far it lies from another one, seed by seed."""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError
from qat_runner.report.differences import CONFIDENCE, Differences
from qat_runner.report.entries import Entry, Width, by_method, by_network, measure_of
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
        against: the method that others are compared with, see `_called`; None: octav, or the first by name.

    Raises:
        ConfigError: there is no such method, or more than one.
    """
    done = [run for run in runs if run.summary is not None and run.bits is not None]
    if against is not None:
        against = _called(against, {run.method for run in done if not run.full_precision})
    gaps = against_full_precision([run.result for run in done])
    gap = {run.folder: gap for run, gap in zip(done, gaps, strict=True) if gap is not None}
    return [each for name, some in by_network(done).items() for each in _of_network(name, some, gap, against)]


def _called(word: str, methods: Collection[str]) -> str:
    """The method that goes by a name, whole, or without what tells it from others if no other one has that.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = [method for method in methods if word in (method, method.partition(", ")[0])]
    if word not in found and len(found) != 1:
        raise ConfigError(f"--against {word}: must be one of these: {'; '.join(sorted(methods)) or 'there are none'}")
    return word if word in found else found[0]


def _of_network(
    name: str, runs: Sequence[Entry], gaps: Mapping[Path, float], against: str | None
) -> Iterator[Standing]:
    measure = measure_of(runs)
    methods = [method for method, some in by_method(runs) if not some[0].full_precision]
    reference = against or next((m for m in methods if m.split(", ")[0] == USUAL), methods[0] if methods else "")
    for bits in sorted({run.bits for run in runs if run.bits is not None}):
        here = by_method(run for run in runs if run.bits == bits)
        values = {method: {r.config.seed: score(r.summary or {}) for r in some} for method, some in here}
        base = values.get(reference, {})
        ranked = sorted(here, key=lambda pair: _mean(values[pair[0]]), reverse=not measure.lower_is_better)
        for method, some in ranked:
            mine, full = values[method], some[0].full_precision
            alone = full or method == reference
            yield Standing(
                *(name, bits, method, full, measure, mine),
                gaps={run.config.seed: gaps[run.folder] for run in some if run.folder in gaps},
                reference="" if full else reference,
                differences={} if alone else {seed: mine[seed] - base[seed] for seed in mine if seed in base},
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
    base = f"vs {references[0]}" if len(references) == 1 else "vs the reference"
    heads = ["network", "bits", "method", "seeds", head(list(dict.fromkeys(each.measure for each in found)))]
    cells = [
        [
            *(each.network, each.bits.told, each.method, str(len(each.values))),
            mean_and_deviation(list(each.values.values())),
            of_some(mean_and_deviation(each.gap.values, "+"), len(each.gaps), len(each.values)),
            of_some(str(each.difference), len(each.differences), len(each.values)),
            "the reference" if each.method == each.reference else each.told,
        ]
        for each in found
    ]
    return Table("Methods over seeds", [*heads, "vs fp32", base, "told"], cells, [*NOTES, *notes])


def numbers(found: Sequence[Standing]) -> Table:
    """The same as numbers, to be computed with: of each seed as well, in the order of the seeds."""
    heads = ["network", "bits", "method", "metric", "seeds", "values", "mean", "deviation", "vs_fp32"]
    heads += ["vs_fp32_seeds", "reference", "difference", "difference_seeds", "low", "high", "told"]
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
    f"{100 * CONFIDENCE:g} % confidence interval of their mean, that of a paired t-test. In parentheses is their "
    "number, where some of the seeds have nothing to compare with.",
    "Each row is tested by itself: of twenty methods that are all alike, one is told from another by chance.",
)
"""Sentences under the table."""
