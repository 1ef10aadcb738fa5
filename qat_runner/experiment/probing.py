"""Measuring networks under candidate bits, and seeking the fewest that are enough.

Each network is measured by a run of its own, which has its record, and is not run again when the search goes on.
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
"""What carries a run out, or looks its result up."""
T = TypeVar("T")


class Probes:
    """Networks with the weights of a run, measured.

    Args:
        config: of the run, of mode allocate.
        weights: a file, or what else a config may name.
        folder: for the probes' own run folders.
        run: see there.
        data: of the run.
    """

    def __init__(self, config: Config, weights: str | None, folder: Path, run: Run, data: Data) -> None:
        self._measured = probe_of(config, weights, folder, data)
        self.steps: int = 0
        """of retraining that they get: as many as were asked for, or a few more, for epochs of one length"""
        if self._measured.training:
            self.steps = self._measured.epochs * (self._measured.limit_train_batches or 0)
        full = changed(config, **in_full_precision(), **_alone(weights, folder), mode=Mode.evaluate)
        self._run = run
        self.reference = self._result(full)
        """of the full-precision network"""
        log.info(f"in full precision: {measured(self.reference).told(score(self.reference))}")

    def network(self, bits: str, rules: Sequence[Mapping[str, Any]], narrowest: int = 0) -> Summary:
        """The result of the quantized network with rules for its bits, after those of the config.

        Args:
            bits: in words, for the log.
            rules: see there.
            narrowest: bits of the weight that has fewest; where they are too many for codes to be watched, none are.
        """
        how = self._measured.oscillations
        if narrowest > how.max_bits:
            how = replace(how, measure=False, freeze_to=None)
        found = self._result(changed(self._measured, rules=[*self._measured.rules, *rules], oscillations=how))
        log.info(f"{bits}: {self.told(found)}")
        return found

    def _result(self, config: Config) -> Summary:
        """Of a probe, whose own log alone has what it says beside warnings."""
        levels = {handler: handler.level for handler in log.handlers}
        try:
            for handler in levels:
                handler.setLevel(logging.WARNING)
            return self._run(config)
        finally:
            for handler, level in levels.items():
                handler.setLevel(level)

    def drop(self, summary: Summary) -> float:
        """How much worse than full precision a result is, in units of the metric."""
        worse = round(score(self.reference) - score(summary), 6)  # 91.73 - 91.23 is half a point, and no more
        return -worse if measured(summary).lower_is_better else worse

    def told(self, summary: Summary, after: str = "") -> str:
        """A result in words: the metric, and how far it is from full precision's.

        Args:
            summary: of the network.
            after: how it came to it.
        """
        metric, drop = measured(summary), self.drop(summary)
        way = ("below" if drop >= 0 else "above") if not metric.lower_is_better else ("above" if drop >= 0 else "below")
        return f"{metric.told(score(summary))}{after}, {abs(drop):.2f} {metric.points} {way} full precision"


def probe_of(config: Config, weights: str | None, folder: Path, data: Data) -> Config:
    """The config of the run that measures a network, but for the rules for its bits.

    Args:
        config, weights, folder, data: as `Probes` takes them.

    Raises:
        ConfigError: what is asked for does not go with so much retraining.
    """
    try:
        return changed(config, **_training(config, data), **_alone(weights, folder))
    except ConfigError as error:
        if not config.retrain_steps:
            raise
        raise ConfigError(f"retrain_steps={config.retrain_steps}, by recipe.retrain: {error}") from error


def _alone(weights: str | None, folder: Path) -> dict[str, Any]:
    """The changes that make a run of its own, for which no bits are chosen, of one with such weights."""
    places: dict[str, Any] = {"runs_dir": str(folder), "run_dir": None, "overwrite": False, "weights": weights}
    kept: dict[str, Any] = {"trackers": [], "noise_batches": 0, "allocation": AllocationConfig()}
    return without_choice() | places | kept


def _training(config: Config, data: Data) -> dict[str, Any]:
    """The keys of a run that measures the network as it is, or after so many steps of retraining, or the next number
    that makes epochs of one length."""
    if not config.retrain_steps:
        return {"mode": Mode.ptq}
    assert config.recipe.retrain is not None
    epochs = math.ceil(config.retrain_steps / data.train_steps(config.recipe.retrain.batch_size))
    steps = math.ceil(config.retrain_steps / epochs)
    new = dict.fromkeys(("batch_size", "lr"))
    return {**new, "mode": Mode.retrain, "epochs": epochs, "limit_train_batches": steps}


def first_that_holds(candidates: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """The first of candidates, in rising order, that something holds of; None: not even of the last.

    By bisection: what holds of one is taken to hold of those after it.
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
