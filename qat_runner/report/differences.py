"""Differences over seeds: their mean, how sure it is, and what it says.

A difference is that of two runs of one seed. Over seeds it has a mean and a 95 % confidence interval, that of a paired
t-test.
"""

import statistics
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

CONFIDENCE = 0.95

ROUNDING = 1e-9
"""Points by which differences that are the same may differ."""


class Verdict(StrEnum):
    """On a statement."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot be told"
    ONE_SEED = "cannot be told: one seed"
    ALIKE = "cannot be told: all seeds alike"
    ALONE = "cannot be told: nothing to compare with"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Differences:
    """In points, one a seed."""

    values: tuple[float, ...]
    certain: bool = False
    """whether values that are all alike are no accident, and sure: networks that have collapsed are at chance alike"""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean; None of one seed, or of several that are all alike and not `certain`.

        Where all are alike, seeds made no difference to what was computed, and were no chance either.
        """
        from scipy.special import stdtrit

        count = len(self.values)
        if count < 2 or (deviation := statistics.stdev(self.values)) < ROUNDING:
            return (self.mean, self.mean) if self.certain and count > 1 else None
        error = deviation / count**0.5
        reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
        return self.mean - reach, self.mean + reach

    def verdict(self, above: float, below: float) -> Verdict:
        """Whether the difference lies between two ends, of which one may be infinite."""
        if not self.values:
            return Verdict.ALONE
        if self.interval is None:
            return Verdict.ONE_SEED if len(self.values) == 1 else Verdict.ALIKE
        low, high = self.interval
        if above < low and high < below:
            return Verdict.HOLDS
        return Verdict.FAILS if high < above or below < low else Verdict.OPEN

    def told(self, lower_is_better: bool) -> str:
        """What it says of two methods: whether the one is better or worse than the other, or why that is not known."""
        if self.interval is None:
            alike = "one seed" if len(self.values) == 1 else "the same for all seeds"
            return alike if self.values else "nothing to compare with"
        low, high = self.interval
        if low <= 0 <= high:
            return "within the seeds' scatter"
        return "better" if (high < 0) == lower_is_better else "worse"

    def __str__(self) -> str:
        if not self.values:
            return ""
        told = f"{self.mean:+.2f}"
        return told if self.interval is None else f"{told} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"
