"""Carrying out a run of mode=allocate: tensors are priced, bits chosen, and the network that has them is measured."""

import csv
import io
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from torch import nn
from tqdm import tqdm

from qat_runner.allocation import (
    COSTS,
    KINDS,
    Allocation,
    InfeasibleError,
    Limit,
    Measure,
    Network,
    Operand,
    Prices,
    allocate_bits,
    front,
    latency_ms,
    network,
    price,
    rules_of,
    uniform,
)
from qat_runner.config import Config, latencies_of
from qat_runner.data import Data
from qat_runner.data.batches import unsharded
from qat_runner.errors import ConfigError, RunError
from qat_runner.experiment.building import CALIBRATION_EPOCH, EXAMPLE
from qat_runner.experiment.probing import Probes, Run, first_that_holds
from qat_runner.runs.files import write_text
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import ALLOCATION, AllocationRecord, Point, PricedTensor, Summary, measured, score
from qat_runner.tasks import task_of

log = logging.getLogger("qat_runner")

POINTS = 25
"""Of the front that is shown, at most."""
FINE = 61
"""Points of the front among which max_drop seeks: a tenth of a bit apart, from 2 to 8."""
Table = Mapping[str, Mapping[int, float]]
"""Tensor -> bits -> price."""
RESAMPLES = 10
"""Of the batches, which tell how far bits depend on them."""


@dataclass(frozen=True)
class Chosen:
    """What a run came to, and the network with the same bits everywhere that it is held against."""

    best: Allocation
    summary: Summary
    width: int | None
    """of all tensors; None: there is none to hold it against"""
    uniform: Summary | None


def carry_out(config: Config, folder: Path, model: nn.Module, data: Data, weights: str | None, run: Run) -> Summary:
    """Choose bits, measure the network that has them, and write down what came of it.

    Args:
        config: resolved, of mode allocate.
        folder: of the run.
        model, data: as `building.build` gives them.
        weights: those of `model`: a file, or what else a config may name.
        run: what measures networks.

    Raises:
        ConfigError: a limit that the narrowest widths do not keep.
        RunError: not even the widest keep max_drop.
    """
    began = time.perf_counter()
    known = network(model, config.allocation.widths, EXAMPLE)
    limits = [Limit(m, most) for key, most in config.limits.items() for m in _measures(config, known, key)]
    try:
        allocate_bits(known, {}, limits, config.allocation.same)  # whether they can be kept does not depend on prices
    except InfeasibleError as error:
        raise ConfigError(f"{config.asked_bits}: {error}") from error
    search = _Search(config, known, _priced(config, model, data, config.allocation.price), limits)
    seconds = time.perf_counter() - began
    foretold = _priced(config, model, data, KINDS[0]).mean() if config.allocation.price == "measured" else {}
    probes = Probes(config, weights, RunFolder(folder).probes, run, data)
    chosen = search.least(probes) if config.max_drop is not None else search.within_limits(probes)
    record = search.record(chosen, probes, seconds, foretold)
    ALLOCATION.write(folder, record)
    rules = {"rules": rules_of(known, chosen.best.bits)}
    write_text(RunFolder(folder).policy, yaml.safe_dump(rules, sort_keys=False, default_flow_style=None))
    write_text(RunFolder(folder).prices, _table(record["tensors"], search.prices.widths))
    log.info(record["answer"])
    told = {"bits": config.asked_bits, "mode": str(config.mode), "answer": record["answer"], "run_dir": str(folder)}
    found: Any = {**chosen.summary, **told}
    summary: Summary = found | {"seconds": time.perf_counter() - began}
    return summary


def _priced(config: Config, model: nn.Module, data: Data, kind: str) -> Prices:
    """Prices on training batches that training never uses."""
    how, objective = config.allocation, task_of(config).objective()
    batches = unsharded(data).train_batches(how.batch_size, CALIBRATION_EPOCH, how.batches)
    with tqdm(total=how.batches, desc="pricing", unit="batch", disable=None, leave=False) as bar:
        try:
            return price(model, batches, objective, how.widths, kind, bar.update)
        except ValueError as error:
            raise RunError(f"pricing failed: {error}") from error


def _measures(config: Config, known: Network, name: str) -> list[Measure]:
    """What a limit is of, or a front goes by."""
    if name != "latency_ms":
        return COSTS["mean_bits" if name == "budget" else name](known)
    try:
        return latency_ms(known, latencies_of(config.allocation.latencies or ""))
    except ValueError as error:
        raise ConfigError(f"allocation.{error}") from error


class _Search:
    """The choice of bits for a network, by its prices.

    Args:
        config: of the run.
        known: the network.
        prices: of its tensors.
        limits: what bits may cost.
    """

    def __init__(self, config: Config, known: Network, prices: Prices, limits: Sequence[Limit]) -> None:
        self.config, self.known, self.prices, self.limits = config, known, prices, limits
        self.mean, self.same = prices.mean(), config.allocation.same
        self.widths = sorted(config.allocation.widths)
        self.cost = _measures(config, known, config.allocation.cost)
        shown = {*COSTS, *(["latency_ms"] if config.allocation.latencies else [])}
        self.shown = {name: _measures(config, known, name) for name in sorted(shown)}
        lowest, highest = (self._figure(uniform(known, self.mean, w)) for w in (self.widths[0], self.widths[-1]))
        self.range = lowest, highest

    def within_limits(self, probes: Probes) -> Chosen:
        """The best under the limits; beside it, the widest uniform network that keeps them."""
        best = allocate_bits(self.known, self.mean, self.limits, self.same)
        kept = [width for width in self.widths if self._keeps(uniform(self.known, self.mean, width))]
        width = kept[-1] if kept else None
        beside = None if width is None else self._measure(probes, uniform(self.known, self.mean, width))
        return Chosen(best, self._measure(probes, best), width, beside)

    def least(self, probes: Probes) -> Chosen:
        """The cheapest that loses no more than max_drop; beside it, the narrowest uniform network that does so."""

        def enough(found: Allocation) -> bool:
            return probes.drop(self._measure(probes, found)) <= (self.config.max_drop or 0)

        limit = first_that_holds(self._evenly(FINE), lambda most: enough(self._best_at(most)))
        best = None if limit is None else self._best_at(limit)
        if best is None:
            raise RunError(
                f"max_drop={self.config.max_drop:g}: not even {self.widths[-1]} bits everywhere lose so little; wider "
                f"allocation.widths may, or retrain_steps"
            )
        width = first_that_holds(self.widths, lambda w: enough(uniform(self.known, self.mean, w)))
        beside = None if width is None else self._measure(probes, uniform(self.known, self.mean, width))
        return Chosen(best, self._measure(probes, best), width, beside)

    def front(self, points: int) -> list[Allocation]:
        """The best bits at so many costs, at most."""
        return front(self.known, self.mean, self.cost, self._evenly(points), self.same)

    def _evenly(self, points: int) -> list[float]:
        """Costs from that of the narrowest widths to that of the widest, evenly apart: in ratio, but for mean bits."""
        even = np.linspace if self.config.allocation.cost == "mean_bits" else np.geomspace
        found: list[float] = even(*self.range, points).tolist()
        return found

    def _best_at(self, most: float) -> Allocation:
        limits = [Limit(measure, most) for measure in self.cost]
        return allocate_bits(self.known, self.mean, limits, self.same)

    def _figure(self, found: Allocation) -> float:
        """What bits cost, of what the front goes by: of several figures the largest."""
        return max(measure.total(self.known, found.bits) for measure in self.cost)

    def _keeps(self, found: Allocation) -> bool:
        return all(limit.kept(self.known, found.bits) for limit in self.limits)

    def _measure(self, probes: Probes, found: Allocation) -> Summary:
        return probes.network(rules_of(self.known, found.bits))

    def record(self, chosen: Chosen, probes: Probes, seconds: float, foretold: Table) -> AllocationRecord:
        """All that a reader, or the page, may ask.

        Args:
            chosen: what came out.
            probes: what it was measured by.
            seconds: of pricing.
            foretold: prices by gradients, where they are measured.
        """
        metric = measured(chosen.summary)
        return {
            "answer": self._answer(chosen, probes),
            "cost": self.config.allocation.cost,
            "price": self.config.allocation.price,
            "metric": metric.name,
            "reference": score(probes.reference),
            "chosen": self._point(chosen.best, score(chosen.summary)),
            "uniform": [self._point_of_width(width, chosen) for width in self.widths],
            "front": [self._point(found) for found in self.front(POINTS)],
            "tensors": [self._tensor(o, chosen.best, foretold) for op in self.known.operations for o in op.operands],
            "stability": self._stability(chosen.best),
            "seconds": seconds,
            "retrain_steps": self.config.retrain_steps,
        }

    def _point_of_width(self, width: int, chosen: Chosen) -> Point:
        known = chosen.uniform is not None and width == chosen.width
        value = score(chosen.uniform) if known and chosen.uniform is not None else None
        return {**self._point(uniform(self.known, self.mean, width), value), "width": width}

    def _point(self, found: Allocation, value: float | None = None) -> Point:
        costs = {m.name: m.total(self.known, found.bits) for several in self.shown.values() for m in several}
        return {"costs": costs, "rise": found.rise, "value": value}

    def _stability(self, best: Allocation) -> float:
        """Bits by which a tensor differs, in the mean, where bits are chosen on other batches of the same kind.

        Batches are drawn with replacement; the costs are those of what was chosen.
        """
        limits = self.limits or [Limit(m, m.total(self.known, best.bits)) for m in self.cost]
        draw, apart = random.Random(0), []
        for _ in range(RESAMPLES):
            drawn = draw.choices(range(self.prices.count), k=self.prices.count)
            other = allocate_bits(self.known, self.prices.mean(drawn), limits, self.same)
            apart += [abs(other.bits[operand.name] - best.bits[operand.name]) for operand in self.known.free]
        return sum(apart) / len(apart)

    def _answer(self, chosen: Chosen, probes: Probes) -> str:
        """The result in a sentence that a person can repeat."""
        after = f" after {self.config.retrain_steps} steps" if self.config.retrain_steps else ""
        said = (
            f"{self.config.model.name} on {self.config.dataset.name} lives with {self._costs(chosen.best)}: "
            f"{_result(chosen.summary, probes, after)}"
        )
        if chosen.uniform is None:
            return f"{said}; no uniform width does"
        needs = "needs" if self.config.max_drop is not None else "with"
        rival = uniform(self.known, self.mean, chosen.width or 0)
        costs = "" if self.config.allocation.cost == "mean_bits" else f" ({self._costs(rival)})"
        return f"{said}; uniform {needs} {chosen.width} bits{costs}: {_result(chosen.uniform, probes)}"

    def _costs(self, found: Allocation) -> str:
        return ", ".join(self._told(measure, found.bits) for measure in self.cost)

    def _told(self, measure: Measure, bits: Mapping[str, int]) -> str:
        value = measure.total(self.known, bits)
        what = measure.name.removeprefix("mean bits of ")
        return f"{value:.1f} bits ({what})" if what != measure.name else f"{value:.3g} {measure.name}"

    def _tensor(self, operand: Operand, best: Allocation, foretold: Table) -> PricedTensor:
        layer, _, tensor = operand.name.rpartition(".")
        noise = self.prices.noise[operand.name].tolist() if operand.free else []
        found: PricedTensor = {
            "layer": layer,
            "tensor": tensor,
            "elements": operand.elements,
            "bits": best.bits[operand.name],
            "noise": {str(w): ratio for w, ratio in zip(self.prices.widths, noise, strict=False)},
            "price": {str(w): each for w, each in self.mean[operand.name].items()} if operand.free else {},
        }
        if operand.free and foretold:
            found["foretold"] = {str(w): each for w, each in foretold[operand.name].items()}
        return found


def _table(tensors: Sequence[PricedTensor], widths: Sequence[int]) -> str:
    """A line a tensor: its bits, and its noise and price at every width; CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    figures: tuple[Literal["noise", "price"], ...] = ("noise", "price")
    writer.writerow(["layer", "tensor", "elements", "bits", *(f"{what}_{w}" for what in figures for w in widths)])
    for t in tensors:
        row = [t[what].get(str(width), "") for what in figures for width in widths]
        writer.writerow([t["layer"], t["tensor"], t["elements"], t["bits"], *row])
    return out.getvalue()


def _result(summary: Summary, probes: Probes, after: str = "") -> str:
    """The metric, and how far it is from full precision's."""
    metric, drop = measured(summary), probes.drop(summary)
    way = ("below" if drop >= 0 else "above") if not metric.lower_is_better else ("above" if drop >= 0 else "below")
    return f"{metric.told(score(summary))}{after}, {abs(drop):.2f} {metric.points} {way} full precision"
