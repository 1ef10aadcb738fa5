"""The evidence that runs give: which runs may be compared, over which seeds, and what a difference says.

A difference is taken between two runs with the same seed that differ only in their row of a table. A statement gives
bounds for the difference. It holds if the whole confidence interval over seeds lies between the bounds, does not hold
if the whole interval lies outside, and is undecided ("cannot be told") otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from qat_runner.config import Config, Distill, differences, identity, plain, run_name
from qat_runner.config.schema import OF_STAGE, RecipeConfig
from qat_runner.paper.tables import paper
from qat_runner.policy import FULL_PRECISION as FULL_BITS
from qat_runner.report.differences import Differences
from qat_runner.report.runs import Run, check_seeds
from qat_runner.report.starts import start_apart
from qat_runner.report.tables import against_full_precision
from qat_runner.runs.records import score

FULL_PRECISION, CHANCE = "full_precision", "chance"
"""What may be subtracted besides a row: full precision, as in reports, or the accuracy of guessing."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: Run
    gap: float | None
    """difference from full precision, in points; None if there is no full-precision run"""

    @property
    def value(self) -> float:
        """The metric that counts, in percent."""
        assert self.run.summary is not None
        return score(self.run.summary)


@dataclass(frozen=True)
class Setup:
    """Runs that differ only in their row of a table, bits and seed, and so may be compared."""

    name: str
    config: Config
    """of one of the runs"""
    results: Sequence[Result]

    @property
    def model(self) -> str:
        return self.config.model.name

    def agrees(self, other: "Setup") -> bool:
        """Return whether a setup of another mode agrees in everything that the modes do not prescribe."""
        prescribed = _prescribed(self.config, other.config)
        pairs = zip(_shared(self.config), _shared(other.config), strict=True)
        return prescribed >= {key for pair in pairs for key in differences(*pair)}

    def cell(self, row: str, bits: int | None) -> dict[int, Result]:
        """Return the results of a row of the tables, by seed; bits=None for full precision.

        Raises:
            ConfigError: the runs differ in more than their seed.
        """
        found = [some for some in self.results if (some.run.row, some.run.weight_bits) == (row, bits or FULL_BITS)]
        check_seeds([some.run for some in found])
        return {some.run.seed: some for some in found}

    def differences(self, row: str, minus: str, bits: int | None, other: "Setup | None" = None) -> Differences:
        """Return a row minus another, over the seeds that both have and that start from the same weights.

        Args:
            row: the row to subtract from.
            minus: the row that is subtracted, FULL_PRECISION or CHANCE.
            bits: bit-width of both; None for full precision.
            other: the setup in which the subtracted row was run, if it is not this one.
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
    """Group the finished runs that are rows of tables into setups; any finished run may serve as full precision.

    Of equal runs, the first counts; the others serve only as full precision of the runs beside them.
    """
    done = [(run, run.summary) for run in runs if run.summary is not None]
    gaps = against_full_precision([run.result for run, _ in done])
    groups: dict[tuple[str, str], list[Result]] = {}
    counted = _first_of_equals([run for run, _ in done])
    for (run, _), gap, first in zip(done, gaps, counted, strict=True):
        if first and is_row(run):
            groups.setdefault(_alike(run), []).append(Result(run, gap))
    for network, quantized in [key for key in groups if key[1] == IN_FULL_PRECISION]:
        others = [some for key, some in groups.items() if key[0] == network and key[1] != quantized]
        for some in others:
            some += groups[network, quantized]
        if others:
            del groups[network, quantized]
    ordered = sorted(groups.values(), key=lambda some: (some[0].run.model, some[0].run.dataset, some[0].run.mode))
    return [Setup(f"S{number}", some[0].run.config, some) for number, some in enumerate(ordered, 1)]


def is_row(run: Run) -> bool:
    """Return whether a run is a row of the paper's tables."""
    return run.row in paper()["labels"]


def repeated(runs: Sequence[Run]) -> list[Run]:
    """Return the finished runs that are rows of tables and equal to an earlier one, so that they do not count."""
    rows = [run for run in runs if run.summary is not None and is_row(run)]
    return [run for run, first in zip(rows, _first_of_equals(rows), strict=True) if not first]


def _first_of_equals(runs: Sequence[Run]) -> list[bool]:
    """Return of each run whether none before it is the same run, of the same seed."""
    names = [(run_name(run.config), run.processes) for run in runs]
    return [names.index(name) == i for i, name in enumerate(names)]


IN_FULL_PRECISION = str([])
"""The second part of what `_alike` returns for a run without quantization."""


def _alike(run: Run) -> tuple[str, str]:
    """Return what all runs of a setup share as text, in the two parts of `_shared`, with the number of processes."""
    plain, beside = _shared(run.config)
    return str([*sorted(plain.items()), run.processes]), str(sorted(beside.items()))


def _shared(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what all runs of a setup share: settings besides quantization, and those of quantization that no row
    determines."""
    recipe = replace(config.recipe, distill=Distill.none, teacher=None)
    config = replace(config, recipe=recipe, seed=0, weights=None)
    plain = identity(replace(config, weight_bits=FULL_BITS, activation_bits=FULL_BITS))
    beside = {key: value for key, value in identity(config).items() if plain.get(key) != value and not _of_row(key)}
    return plain, beside


def _prescribed(one: Config, other: Config) -> set[str]:
    """Return the settings that two modes prescribe, and in which their setups may differ.

    These are the mode itself, and the keys in which the stages of the modes differ in the recipes of both setups: the
    learning rate for training from scratch and long retraining, also the epochs for short retraining. If training from
    scratch is one of the modes, the part of the weights file is another.
    """
    keys = set.intersection(*(_apart(config.recipe, one.mode, other.mode) for config in (one, other)))
    of_start = {"weights_part"} if None in (one.weights, other.weights) else set()
    of_stage = {f"recipe.{key}" for key in (*keys, *OF_STAGE)}  # of those in OF_STAGE, the run's own values count
    return {"mode", *of_start, *of_stage, *keys}


def _apart(recipe: RecipeConfig, *modes: str) -> set[str]:
    """Return the keys in which the stages of two modes differ; none if the recipe lacks one of them."""
    one, other = (getattr(recipe, mode) for mode in modes)
    return set() if None in (one, other) else {*differences(plain(one), plain(other))}


def _of_row(key: str) -> bool:
    """Whether the row of a run determines a key, or the key has no influence on results."""
    own = key.startswith(("clipping.", "gradient.")) and key not in ("clipping.eval_mode", "clipping.sync")
    return own or key in ("weight_bits", "activation_bits", "noise_batches")


def fits(model: str, patterns: Sequence[str]) -> bool:
    """Whether the name of a network matches one of the patterns."""
    return any(fnmatchcase(model, pattern) for pattern in patterns)
