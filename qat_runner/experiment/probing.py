"""Measuring networks with candidate bit allocations, and searching for the smallest one that suffices.

Each network is measured by a separate run with its own record, so that a search that resumes does not repeat it.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qat_runner.config import AllocationConfig, Config, Mode, changed, in_full_precision, without_choice
from qat_runner.data import Data
from qat_runner.errors import ConfigError
from qat_runner.runs.records import Summary, measured, score

log = logging.getLogger("qat_runner")

Run = Callable[[Config], Summary]
"""A function that carries out a run, or reads its result if it is finished."""
T = TypeVar("T")


class Probes:
    """Measurements of networks that have the weights of a run.

    Args:
        config: config of the run, of mode allocate.
        weights: a file, or anything else that a config accepts.
        folder: parent folder of the run folders of the probes.
        run: function that carries out a run.
        data: data of the run.
    """

    def __init__(self, config: Config, weights: str | None, folder: Path, run: Run, data: Data) -> None:
        self._measured = probe_of(config, weights, folder, data)
        self.steps: int = 0
        """retraining steps per network: as requested, or slightly more so that all epochs have the same length"""
        if self._measured.training:
            self.steps = self._measured.epochs * (self._measured.limit_train_batches or 0)
        full = changed(config, **in_full_precision(), **_separate_run(weights, folder), mode=Mode.evaluate)
        self._run = run
        self.reference = self._result(full)
        """result of the full-precision network"""
        log.info(f"in full precision: {measured(self.reference).describe(score(self.reference))}")

    def network(self, bits: str, rules: Sequence[Mapping[str, Any]], narrowest: int = 0) -> Summary:
        """Return the result of the quantized network with rules for its bit-widths, appended to those of the config.

        Args:
            bits: description of the allocation for the log.
            rules: the rules for the bit-widths.
            narrowest: smallest bit-width of a weight; if it is above oscillations.max_bits, no codes are tracked.
        """
        how = self._measured.oscillations
        if narrowest > how.max_bits:
            how = replace(how, measure=False, freeze_to=None)
        found = self._result(changed(self._measured, rules=[*self._measured.rules, *rules], oscillations=how))
        log.info(f"{bits}: {self.describe(found)}")
        return found

    def _result(self, config: Config) -> Summary:
        """Carry out a probe; its messages below warnings go only to its own log."""
        levels = {handler: handler.level for handler in log.handlers}
        try:
            for handler in levels:
                handler.setLevel(logging.WARNING)
            return self._run(config)
        finally:
            for handler, level in levels.items():
                handler.setLevel(level)

    def drop(self, summary: Summary) -> float:
        """Return by how much a result is worse than full precision, in units of the metric."""
        worse = round(score(self.reference) - score(summary), 6)  # so that 91.73 - 91.23 is exactly 0.5
        return -worse if measured(summary).lower_is_better else worse

    def describe(self, summary: Summary, after: str = "") -> str:
        """Describe a result: the metric, and its difference from full precision.

        Args:
            summary: result of the network.
            after: text inserted after the metric, such as the number of retraining steps.
        """
        metric, drop = measured(summary), self.drop(summary)
        way = "below" if (drop > 0) != metric.lower_is_better else "above"
        gap = f"{abs(drop):.2f}"
        compared = "as good as" if gap == "0.00" else f"{gap} {metric.points} {way}"
        return f"{metric.describe(score(summary))}{after}, {compared} full precision"


def probe_of(config: Config, weights: str | None, folder: Path, data: Data) -> Config:
    """Return the config of the run that measures a network, without the rules for its bit-widths.

    Args:
        config, weights, folder, data: as in `Probes`.

    Raises:
        ConfigError: the config is not compatible with the requested retraining.
    """
    try:
        return changed(config, **_training(config, data), **_separate_run(weights, folder))
    except ConfigError as error:
        if not config.retrain_steps:
            raise
        raise ConfigError(f"retrain_steps={config.retrain_steps}, by recipe.retrain: {error}") from error


def _separate_run(weights: str | None, folder: Path) -> dict[str, Any]:
    """Return the config changes for a separate run with these weights, without bit allocation."""
    places: dict[str, Any] = {"runs_dir": str(folder), "run_dir": None, "overwrite": False, "weights": weights}
    kept: dict[str, Any] = {"trackers": [], "noise_batches": 0, "allocation": AllocationConfig()}
    return without_choice() | places | kept


def _training(config: Config, data: Data) -> dict[str, Any]:
    """Return the config keys for measuring a network directly or after retraining.

    The number of retraining steps is rounded up to a number that gives all epochs the same length.
    """
    if not config.retrain_steps:
        return {"mode": Mode.ptq}
    assert config.recipe.retrain is not None
    epochs = math.ceil(config.retrain_steps / data.train_steps(config.recipe.retrain.batch_size))
    steps = math.ceil(config.retrain_steps / epochs)
    new = dict.fromkeys(("batch_size", "lr"))
    return {**new, "mode": Mode.retrain, "epochs": epochs, "limit_train_batches": steps}


def first_that_holds(candidates: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """Return the first of the candidates, in ascending order, for which `holds` is true; None if it is for none.

    The search is a bisection: if `holds` is true for a candidate, it is assumed to be true for all later ones.
    """
    if not candidates or not holds(candidates[-1]):
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if holds(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return candidates[high]
