"""The result of a bit allocation, for its record and for readers."""

import csv
import io
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from qat_runner.allocation import Allocation, Limit, Operand, Prices, allocate_bits
from qat_runner.experiment.choosing import Chosen, Search
from qat_runner.experiment.probing import Probes
from qat_runner.runs.records import AllocationRecord, Point, PricedTensor, measured, score

POINTS = 25
"""Largest number of points of the recorded Pareto front."""
RESAMPLES = 10
"""Number of resamplings of the batches, which estimate how much the allocation depends on them."""


def recorded(search: Search, chosen: Chosen, probes: Probes, beside: Prices, seconds: float) -> AllocationRecord:
    """Return the record of a bit allocation, for allocation.json and the HTML report.

    Args:
        search: the search that chose the bits.
        chosen: its result.
        probes: the measurements it was based on.
        beside: prices of another kind, at some bit-widths, for comparison.
        seconds: duration of pricing.
    """
    others = beside.mean()
    operands = [operand for operation in search.known.operations for operand in operation.operands]
    alike = [search.uniform(width) for width in search.widths]
    own = [found for found, _ in search.measured if all(found.bits != other.bits for other in alike)]
    return {
        "answer": _answer(search, chosen, probes),
        "cost": search.config.allocation.cost,
        "figures": [measure.name for measure in search.cost],
        "price": search.config.allocation.price,
        "beside": beside.kind,
        "metric": measured(chosen.summary).name,
        "reference": score(probes.reference),
        "chosen": _point(search, chosen.best),
        "uniform": [
            {**_point(search, found), "width": width} for width, found in zip(search.widths, alike, strict=True)
        ],
        "measured": [_point(search, found) for found in own],
        "front": [_point(search, found) for found in search.front(POINTS)],
        "tensors": [_tensor(search, operand, chosen.best, others) for operand in operands],
        "stability": _stability(search, chosen.best),
        "seconds": seconds,
        "retrain_steps": probes.steps,
    }


def table(tensors: Sequence[PricedTensor], widths: Sequence[int]) -> str:
    """Return a CSV table with one line per tensor: its bits, and its noise and price at every bit-width."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    figures: tuple[Literal["noise", "price"], ...] = ("noise", "price")
    writer.writerow(["layer", "tensor", "elements", "bits", *(f"{what}_{w}" for what in figures for w in widths)])
    for t in tensors:
        row = [t[what].get(str(width), "") for what in figures for width in widths]
        writer.writerow([t["layer"], t["tensor"], t["elements"], t["bits"], *row])
    return out.getvalue()


def _point(search: Search, found: Allocation) -> Point:
    """Return the costs of an allocation, its total price, and the metric if it was measured."""
    summary = search.result(found)
    costs = {m.name: m.total(search.known, found.bits) for several in search.shown.values() for m in several}
    return {"costs": costs, "rise": found.rise, "value": None if summary is None else score(summary)}


def _tensor(
    search: Search, operand: Operand, best: Allocation, others: Mapping[str, Mapping[int, float]]
) -> PricedTensor:
    layer, _, tensor = operand.name.rpartition(".")
    found: PricedTensor = {
        "layer": layer,
        "tensor": tensor,
        "elements": operand.elements,
        "bits": best.bits[operand.name],
        "noise": {},
        "price": {},
        "beside": {},
    }
    if operand.has_choice and operand.name in search.mean:
        prices, noise = search.prices, search.prices.noise[operand.name].tolist()
        found["noise"] = _by_width(dict(zip(prices.widths, noise, strict=True)))
        found["price"] = _by_width(search.mean[operand.name])
        found["beside"] = _by_width(others.get(operand.name, {}))
    return found


def _by_width(figures: Mapping[int, float]) -> dict[str, float]:
    return {str(width): figure for width, figure in figures.items()}


def _stability(search: Search, best: Allocation) -> float | None:
    """Return by how many bits a tensor differs on average if the allocation is based on resampled batches.

    Batches are drawn with replacement. Without explicit limits, the costs of the chosen allocation are the limits. None
    if there is only one batch.
    """
    known, prices = search.known, search.prices
    if prices.count < 2:
        return None
    limits = search.limits or [Limit(m, m.total(known, best.bits)) for m in search.cost]
    draw, apart = random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = draw.choices(range(prices.count), k=prices.count)
        other = allocate_bits(known, prices.mean(drawn), limits, search.same)
        apart += [abs(other.bits[operand.name] - best.bits[operand.name]) for operand in known.free]
    return sum(apart) / len(apart)


def _answer(search: Search, chosen: Chosen, probes: Probes) -> str:
    """Return the result as one sentence for readers."""
    config = search.config
    after = f" after {probes.steps} steps" if probes.steps else ""
    found = f"{search.describe(chosen.best)}: {probes.describe(chosen.summary, after)}"
    network = f"{config.model.name} on {config.dataset.name}"
    if config.max_drop is None:
        return f"{network} with {config.asked_bits} has {found}; {_beside_within(search, chosen, probes)}"
    return f"{network} lives with {found}; {_beside_least(search, chosen, probes)}"


def _beside_within(search: Search, chosen: Chosen, probes: Probes) -> str:
    """Return what uniform bits give within the limits."""
    if chosen.uniform is None:
        return f"no uniform width keeps {search.config.asked_bits}"
    if search.uniform(chosen.width or 0).bits == chosen.best.bits:
        return f"these are {chosen.width} bits everywhere"
    return f"uniform with {_uniform(search, chosen)}: {probes.describe(chosen.uniform)}"


def _beside_least(search: Search, chosen: Chosen, probes: Probes) -> str:
    """Return how many uniform bits lose no more than max_drop."""
    if chosen.uniform is None:
        return "no uniform width does"
    if search.uniform(chosen.width or 0).bits == chosen.best.bits:
        return f"these are {chosen.width} bits everywhere: no cheaper ones that were measured lose so little"
    return f"uniform needs {_uniform(search, chosen)}: {probes.describe(chosen.uniform)}"


def _uniform(search: Search, chosen: Chosen) -> str:
    """Describe the uniform network by its bits and, if these are not its cost, also by its cost."""
    cost = search.describe(search.uniform(chosen.width or 0))
    return f"{chosen.width} bits" if search.config.allocation.cost == "mean_bits" else f"{chosen.width} bits ({cost})"
