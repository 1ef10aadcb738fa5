"""Differences over seeds: their mean, how sure it is, and what it says.

A difference is that of two runs of one seed. Over seeds it has a mean and a 95 % confidence interval, that of a paired
t-test.
"""

import statistics
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

CONFIDENCE = 0.95


class Verdict(StrEnum):
    """On a statement."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot be told"
    ONE_SEED = "cannot be told: one seed"
    ALONE = "cannot be told: nothing to compare with"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Differences:
    """In points, one a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean; None of one seed."""
        from scipy.special import stdtrit

        count = len(self.values)
        if count < 2:
            return None
        error = statistics.stdev(self.values) / count**0.5
        reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
        return self.mean - reach, self.mean + reach

    def verdict(self, above: float, below: float) -> Verdict:
        """Whether the difference lies between two ends, of which one may be infinite."""
        if not self.values:
            return Verdict.ALONE
        if self.interval is None:
            return Verdict.ONE_SEED
        low, high = self.interval
        if above < low and high < below:
            return Verdict.HOLDS
        return Verdict.FAILS if high < above or below < low else Verdict.OPEN

    def told(self, lower_is_better: bool) -> str:
        """What it says of two methods: whether the one is better or worse than the other, or why that is not known."""
        if self.interval is None:
            return "one seed" if self.values else "nothing to compare with"
        low, high = self.interval
        if low <= 0 <= high:
            return "within the seeds' scatter" if any(self.values) else "the same"
        return "better" if (high < 0) == lower_is_better else "worse"

    def __str__(self) -> str:
        if not self.values:
            return ""
        told = f"{self.mean:+.2f}"
        return told if self.interval is None else f"{told} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"
