"""Differences over seeds: their mean, its confidence interval, and the verdict.

A difference is taken between two runs with the same seed. Over seeds, it has a mean and a 95 % confidence interval,
that of a paired t-test.
"""

import statistics
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

CONFIDENCE = 0.95

ROUNDING = 1e-9
"""Standard deviation, in points, below which differences count as equal."""


class Verdict(StrEnum):
    """A verdict on a statement."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot be told"
    ONE_SEED = "cannot be told: one seed"
    ALIKE = "cannot be told: equal differences"
    ALONE = "cannot be told: nothing to compare with"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Differences:
    """Differences in points, one per seed."""

    values: tuple[float, ...]
    certain: bool = False
    """whether equal values for all seeds are conclusive: networks that have collapsed are all exactly at chance"""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean; None for one seed, or for equal values that are not `certain`.

        Equal values say nothing about the scatter: the seed had no influence on the results, or the same one on both.
        """
        from scipy.special import stdtrit

        count = len(self.values)
        if count < 2 or (deviation := statistics.stdev(self.values)) < ROUNDING:
            return (self.mean, self.mean) if self.certain and count > 1 else None
        error = deviation / count**0.5
        reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
        return self.mean - reach, self.mean + reach

    def verdict(self, above: float, below: float) -> Verdict:
        """Return whether the difference lies between two bounds, one of which may be infinite."""
        if not self.values:
            return Verdict.ALONE
        if self.interval is None:
            return Verdict.ONE_SEED if len(self.values) == 1 else Verdict.ALIKE
        low, high = self.interval
        if above < low and high < below:
            return Verdict.HOLDS
        return Verdict.FAILS if high < above or below < low else Verdict.OPEN

    def describe(self, lower_is_better: bool) -> str:
        """Return whether one method is better or worse than the other, in words, or why that is undecided."""
        if self.interval is None:
            alike = "one seed" if len(self.values) == 1 else "the same difference for all seeds"
            return alike if self.values else "nothing to compare with"
        low, high = self.interval
        if low <= 0 <= high:
            return "within the seeds' scatter"
        return "better" if (high < 0) == lower_is_better else "worse"

    def __str__(self) -> str:
        if not self.values:
            return ""
        text = f"{self.mean:+.2f}"
        return text if self.interval is None else f"{text} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"
