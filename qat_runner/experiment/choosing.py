"""Choosing the bit allocation of a priced network: the best within limits, or the cheapest that is accurate enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qat_runner.allocation import (
    COSTS,
    Allocation,
    Limit,
    Measure,
    Network,
    Prices,
    allocate_bits,
    front,
    latency_ms,
    rules_of,
    uniform,
)
from qat_runner.config import Config, latencies_of
from qat_runner.errors import ConfigError, RunError
from qat_runner.experiment.probing import Probes, first_that_holds
from qat_runner.runs.records import Summary
from qat_runner.wording import digits

FINE = 61
"""Points of the front that are searched for max_drop: a tenth of a bit apart, from 2 to 8."""


@dataclass(frozen=True)
class Chosen:
    """The chosen allocation and its result, and the uniform network that it is compared with."""

    best: Allocation
    summary: Summary
    width: int | None
    """bit-width of the uniform network; None if there is none to compare with"""
    uniform: Summary | None


def measures_of(config: Config, known: Network, name: str) -> list[Measure]:
    """Return the cost measures behind the name of a limit or of the cost of a front."""
    if name != "latency_ms":
        return COSTS["mean_bits" if name == "budget" else name](known)
    try:
        return latency_ms(known, latencies_of(config.allocation.latencies or ""), config.allocation.same)
    except ValueError as error:
        raise ConfigError(f"allocation.{error}") from error


def reported_costs(config: Config) -> list[str]:
    """Return the names of the costs that are reported for each network, whatever the limits are."""
    return sorted({*COSTS, *(["latency_ms"] if config.allocation.latencies is not None else [])})


class Search:
    """The search for the bit allocation of a network, based on its prices.

    Args:
        config: config of the run.
        known: the network.
        prices: prices of its tensors.
        limits: limits on the costs of the allocation.
    """

    def __init__(self, config: Config, known: Network, prices: Prices, limits: Sequence[Limit]) -> None:
        self.config, self.known, self.prices, self.limits = config, known, prices, limits
        self.mean, self.same = prices.mean(), config.allocation.same
        self.widths = sorted({*config.allocation.widths})
        self.cost = measures_of(config, known, config.allocation.cost)
        self.shown = {name: measures_of(config, known, name) for name in reported_costs(config)}
        self.measured: list[tuple[Allocation, Summary]] = []
        """all measured allocations, each once, with their results"""
        self.range = self._lowest(), max(map(self._figure, (self.uniform(self.widths[-1]), self._best_at(math.inf))))

    def within_limits(self, probes: Probes) -> Chosen:
        """Return the best allocation within the limits, and the widest uniform network within them."""
        best = allocate_bits(self.known, self.mean, self.limits, self.same)
        kept = [width for width in self.widths if self._keeps(self.uniform(width))]
        width = kept[-1] if kept else None
        beside = None if width is None else self._measure_uniform(probes, width)
        return Chosen(best, self.measure(probes, best), width, beside)

    def least(self, probes: Probes) -> Chosen:
        """Return the cheapest allocation that loses no more than max_drop, and the narrowest such uniform network.

        All allocations measured during the search are considered; both results may be the same network.
        """

        def small(summary: Summary) -> bool:
            return probes.drop(summary) <= (self.config.max_drop or 0)

        first_that_holds(self._evenly(FINE), lambda most: small(self.measure(probes, self._best_at(most))))
        width = first_that_holds(self.widths, lambda w: small(self._measure_uniform(probes, w)))
        enough = [(found, summary) for found, summary in self.measured if small(summary)]
        if not enough:
            raise RunError(
                f"max_drop={self.config.max_drop:g}: even {self.widths[-1]} bits everywhere lose more; larger "
                f"allocation.widths or retrain_steps may help"
            )
        beside = None if width is None else self._measure_uniform(probes, width)
        best, summary = min(enough, key=lambda pair: self._figure(pair[0]))
        return Chosen(best, summary, width, beside)

    def uniform(self, width: int) -> Allocation:
        """Return the allocation with the same bit-width for all tensors that have a choice."""
        return uniform(self.known, self.mean, width)

    def front(self, points: int) -> list[Allocation]:
        """Return the Pareto front: the best allocations at up to `points` costs."""
        return front(self.known, self.mean, self.cost, self._evenly(points), self.same)

    def _evenly(self, points: int) -> list[float]:
        """Return costs from the lowest one to that of the widest bits.

        They are spaced geometrically, but linearly for mean bits and if the lowest cost is not above 0.
        """
        even = self.config.allocation.cost == "mean_bits" or self.range[0] <= 0
        found: list[float] = (np.linspace if even else np.geomspace)(*self.range, points).tolist()
        return found

    def _best_at(self, most: float) -> Allocation:
        limits = [Limit(measure, most) for measure in self.cost]
        return allocate_bits(self.known, self.mean, limits, self.same)

    def _lowest(self) -> float:
        """Return the cost of the cheapest allocation, which for latencies need not be the narrowest one."""
        choices = [operation.choices(self.same) for operation in self.known.operations]
        tables = {measure: measure.table(self.known, choices) for measure in self.cost}
        return max(measure.rest + sum(float(row.min()) for row in table) for measure, table in tables.items())

    def _figure(self, found: Allocation) -> float:
        """Return the cost of an allocation by the measure of the front; of several measures the largest value."""
        return max(measure.total(self.known, found.bits) for measure in self.cost)

    def _keeps(self, found: Allocation) -> bool:
        return all(limit.kept(self.known, found.bits) for limit in self.limits)

    def _measure_uniform(self, probes: Probes, width: int) -> Summary:
        return self.measure(probes, self.uniform(width), f"uniform {width} bits")

    def measure(self, probes: Probes, found: Allocation, said: str | None = None) -> Summary:
        """Return the result of the network with an allocation, which the log calls `said` or describes by its cost."""
        summary = self.result(found)
        if summary is None:
            operands = (operand for operation in self.known.operations for operand in operation.operands)
            narrowest = min((found.bits[operand.name] for operand in operands if operand.weight), default=0)
            summary = probes.network(said or self.describe(found), rules_of(self.known, found.bits), narrowest)
            self.measured.append((found, summary))
        return summary

    def result(self, found: Allocation) -> Summary | None:
        """Return the result of the network with an allocation; None if it was not measured."""
        return next((summary for other, summary in self.measured if other.bits == found.bits), None)

    def describe(self, found: Allocation) -> str:
        """Describe the cost of an allocation by the measures of the front."""
        return ", ".join(_cost(measure, measure.total(self.known, found.bits)) for measure in self.cost)


def _cost(measure: Measure, value: float) -> str:
    what = measure.name.removeprefix("mean bits of ")
    return f"{value:.1f} bits ({what})" if what != measure.name else f"{digits(value)} {measure.name}"
