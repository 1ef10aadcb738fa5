"""What runs say about a difference: which may be compared, over which seeds, and whether it lies where it should.

A difference is that of two runs of one seed that differ in their row of a table alone. A statement names two ends that
it has to lie between. It holds where the whole confidence interval over seeds does, does not hold where none of it
does, and else cannot be told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from qat_runner.config import Config, Distill, identity
from qat_runner.paper.tables import paper
from qat_runner.policy import FULL_PRECISION as FULL_BITS
from qat_runner.report import tables
from qat_runner.report.differences import Differences
from qat_runner.report.runs import Run, check_seeds
from qat_runner.report.starts import start_apart
from qat_runner.report.tables import against_full_precision
from qat_runner.runs.records import score

FULL_PRECISION, CHANCE = "full_precision", "chance"
"""What may be subtracted, beside rows: full precision, as reports have it, and what guessing gives."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: Run
    gap: float | None
    """to full precision, in points; None where that is missing"""

    @property
    def value(self) -> float:
        """What counts, in percent."""
        assert self.run.summary is not None
        return score(self.run.summary)


@dataclass(frozen=True)
class Setup:
    """Runs that differ in their row of a table, bits and seed alone: what may be compared."""

    name: str
    config: Config
    """of one of them"""
    results: Sequence[Result]

    @property
    def model(self) -> str:
        return self.config.model.name

    @property
    def scene(self) -> dict[str, Any]:
        """What setups of several modes share: the network and the data."""
        return {key: value for key, value in identity(self.config).items() if key.startswith(("model.", "dataset."))}

    def cell(self, row: str, bits: int | None) -> dict[int, Result]:
        """The results of a row of the tables, by seed; bits=None in full precision.

        Raises:
            ConfigError: they differ in more than their seed.
        """
        found = [some for some in self.results if (some.run.row, some.run.weight_bits) == (row, bits or FULL_BITS)]
        check_seeds([some.run for some in found])
        return {some.run.seed: some for some in found}

    def differences(self, row: str, minus: str, bits: int | None, other: "Setup | None" = None) -> Differences:
        """Of a row to another one, to FULL_PRECISION or to CHANCE, over the seeds that both have, from the same start.

        Args:
            row: whose.
            minus: what is subtracted.
            bits: of both; None in full precision.
            other: where the second one was run, if not here.
        """
        mine = self.cell(row, bits)
        if minus == FULL_PRECISION:
            return Differences(tuple(some.gap for some in mine.values() if some.gap is not None))
        if minus == CHANCE:
            classes = self.config.dataset.num_classes
            found = () if classes is None else tuple(some.value - 100 / classes for some in mine.values())
            return Differences(found, certain=self.config.training)
        theirs = (other or self).cell(minus, bits)
        pairs = [(some, theirs[seed]) for seed, some in mine.items() if seed in theirs]
        alike = [(a, b) for a, b in pairs if not start_apart(a.run.config, b.run.config)]
        return Differences(tuple(a.value - b.value for a, b in alike))


def setups_of(runs: Sequence[Run]) -> list[Setup]:
    """The finished runs that are rows of tables, as setups; full precision may be any other finished run of these."""
    done = [(run, run.summary) for run in runs if run.summary is not None]
    gaps = against_full_precision([tables.Result(run.config, summary, run.place) for run, summary in done])
    groups: dict[tuple[str, str], list[Result]] = {}
    for (run, _), gap in zip(done, gaps, strict=True):
        if run.row in paper()["labels"]:
            groups.setdefault(_alike(run.config), []).append(Result(run, gap))
    for network, quantized in [key for key in groups if key[1] == IN_FULL_PRECISION]:
        others = [some for key, some in groups.items() if key[0] == network and key[1] != quantized]
        for some in others:
            some += groups[network, quantized]
        if others:
            del groups[network, quantized]
    ordered = sorted(groups.values(), key=lambda some: (some[0].run.model, some[0].run.dataset, some[0].run.mode))
    return [Setup(f"S{number}", some[0].run.config, some) for number, some in enumerate(ordered, 1)]


IN_FULL_PRECISION = str([])
"""What `_alike` says of the quantization of a network without any."""


def _alike(config: Config) -> tuple[str, str]:
    """What all runs of a setup share: all but quantization, and what of that no row says."""
    recipe = replace(config.recipe, distill=Distill.none, teacher=None)
    config = replace(config, recipe=recipe, seed=0, weights=None)
    plain = identity(replace(config, weight_bits=FULL_BITS, activation_bits=FULL_BITS))
    beside = {key: value for key, value in identity(config).items() if plain.get(key) != value and not _of_row(key)}
    return str(sorted(plain.items())), str(sorted(beside.items()))


def _of_row(key: str) -> bool:
    """Whether a row says what a key is, or it is none of any result."""
    own = key.startswith(("clipping.", "gradient.")) and key not in ("clipping.eval_mode", "clipping.sync")
    return own or key in ("weight_bits", "activation_bits", "noise_batches")


def fits(model: str, patterns: Sequence[str]) -> bool:
    """Whether a network is one of those that patterns are for."""
    return any(fnmatchcase(model, pattern) for pattern in patterns)
