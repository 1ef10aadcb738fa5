"""The best widths under limits, exactly: a multiple-choice knapsack problem, by integer programming (SciPy's HiGHS)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np

from qat_runner.allocation.costs import Measure
from qat_runner.allocation.operations import Network

log = logging.getLogger("qat_runner")


class InfeasibleError(ValueError):
    """No widths keep a limit."""


@dataclass(frozen=True)
class Limit:
    """What a figure of the network may be at most."""

    measure: Measure
    most: float

    def kept(self, network: Network, bits: Mapping[str, int]) -> bool:
        """Whether so many bits for each tensor keep it."""
        return self.measure.total(network, bits) <= self.most * (1 + _SLACK)


@dataclass(frozen=True)
class Allocation:
    """Bits for each tensor of a network."""

    bits: dict[str, int]
    """by name of the tensor; also of those that have no choice"""
    rise: float
    """what the loss is foretold to rise by; in the unit of the prices"""


def allocate_bits(
    network: Network, prices: Mapping[str, Mapping[int, float]], limits: Sequence[Limit], same: bool = False
) -> Allocation:
    """The widths of least price that keep all limits.

    Args:
        network: see `operations.network`.
        prices: name of a tensor -> bits -> price, of all that have a choice.
        limits: at most how much of what.
        same: whether both operands of an operation are to have the same bits, where both have a choice.

    Raises:
        InfeasibleError: a limit is below what the narrowest widths come to.
        ValueError: a tensor that has a choice has no price.
    """
    if unpriced := [operand.name for operand in network.free if operand.name not in prices]:
        raise ValueError(
            f"{', '.join(unpriced)}: without a price, since no batch came by there, or no gradient, which "
            f"price=measured does without; or rules say the bits"
        )
    choices = [operation.choices(same) for operation in network.operations]
    values = [
        np.array([sum(_price(prices, op.operands[i].name, w) for i, w in enumerate(widths)) for widths in some])
        for op, some in zip(network.operations, choices, strict=True)
    ]
    tables = [limit.measure.table(network, choices) for limit in limits]
    room = np.array([limit.most - limit.measure.rest for limit in limits])
    for limit, table, left in zip(limits, tables, room, strict=True):
        least = sum(float(row.min()) for row in table)
        if least > left * (1 + _SLACK):
            raise InfeasibleError(
                f"{limit.measure.name} of {limit.most:g} cannot be kept: the narrowest widths come to "
                f"{_rounded_up(least + limit.measure.rest)}"
            )
    chosen = _solve(values, tables, room)
    bits = {
        operand.name: width
        for operation, some, at in zip(network.operations, choices, chosen, strict=True)
        for operand, width in zip(operation.operands, some[at], strict=True)
    }
    return Allocation(bits, float(sum(row[at] for row, at in zip(values, chosen, strict=True))))


def _rounded_up(value: float) -> str:
    """In four digits, so that a limit of what is told can be kept."""
    exact = value * (1 - 1e-12)  # sums that are equal on paper to what four digits tell stay that
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal_from_float(exact)):.4g}"


def front(
    network: Network,
    prices: Mapping[str, Mapping[int, float]],
    measures: Sequence[Measure],
    limits: Sequence[float],
    same: bool = False,
) -> list[Allocation]:
    """The best widths at each of several limits of the same measures, from the tightest on.

    Each is optimal under its limit, so that together they are points of the Pareto front.
    """
    found: list[Allocation] = []
    for most in sorted(limits):
        best = allocate_bits(network, prices, [Limit(measure, most) for measure in measures], same)
        if not found or best.bits != found[-1].bits:
            found.append(best)
    return found


def uniform(network: Network, prices: Mapping[str, Mapping[int, float]], width: int) -> Allocation:
    """The same bits for all tensors that have a choice."""
    bits = {o.name: width if o.free else o.widths[0] for operation in network.operations for o in operation.operands}
    return Allocation(bits, sum(_price(prices, name, w) for name, w in bits.items()))


def _price(prices: Mapping[str, Mapping[int, float]], tensor: str, bits: int) -> float:
    return prices[tensor][bits] if tensor in prices else 0.0


_SLACK = 1e-9
"""Of a limit, relatively: sums that are equal on paper may differ in last bits."""


def _solve(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], room: np.ndarray) -> list[int]:
    """One choice a row, such that the sum of values is least and that of each table is within its room.

    The solver's tolerances are those of the largest value, beside which differences of a sensitive network are small.
    So values count from the least of their row on, and what alone exceeds the sum that was found is left out of the
    next round, which has a smaller scale.
    """
    excess = [row - row.min() for row in values]
    kept = [np.arange(len(row)) for row in values]
    best, chosen = np.inf, [0] * len(values)
    while True:
        some = [[row[k] for row, k in zip(rows, kept, strict=True)] for rows in (excess, *tables)]
        found = [int(k[at]) for k, at in zip(kept, _solve_once(some[0], some[1:], room), strict=True)]
        total = float(sum(row[at] for row, at in zip(excess, found, strict=True)))
        if not total < best * (1 - _SLACK):
            return chosen
        best, chosen = total, found
        kept = [np.flatnonzero(row <= best) for row in excess]


def _solve_once(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], room: np.ndarray) -> list[int]:
    """The same, as exactly as HiGHS is beside the largest value.

    HiGHS lets a sum exceed its room by _TOLERANCE of the table's largest cost. Where that is what a choice lives by,
    the room is made so much smaller that the choice falls out, while whatever truly keeps it stays in.
    """
    kept = [_not_dominated(np.stack([row, *(table[i] for table in tables)])) for i, row in enumerate(values)]
    offered = [row[k] for row, k in zip(values, kept, strict=True)]
    costs = [[row[k] for row, k in zip(table, kept, strict=True)] for table in tables]
    scales = np.array([max(max(float(np.abs(row).max()) for row in cost), 1e-300) for cost in costs])
    scaled = [[row / scale for row in cost] for cost, scale in zip(costs, scales, strict=True)]
    most, less = room * (1 + _SLACK) / scales, np.zeros(len(costs))
    for _ in range(_TRIES):
        found = _by_highs(offered, scaled, most - less)
        sums = [float(sum(row[at] for row, at in zip(cost, found, strict=True))) for cost in scaled]
        excess = np.array(sums) - most
        if not (excess > 0).any():
            return [int(k[at]) for k, at in zip(kept, found, strict=True)]
        less = np.where(excess > 0, np.maximum(less + excess, _TOLERANCE - excess / 2), less)
    raise InfeasibleError("unsolved: no widths that keep all limits were found within the solver's tolerance")


def _by_highs(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], most: np.ndarray) -> list[int]:
    """One choice a row of least value, such that the sum of each table, whose costs are 1 at most, is so much."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array, vstack

    one_a_row = block_diag([np.ones((1, len(row))) for row in values], format="csr")
    count = one_a_row.shape[1]
    within = csr_array(np.stack([np.concatenate(table) for table in tables])) if tables else csr_array((0, count))
    lower = np.concatenate([np.ones(len(values)), np.full(len(tables), -np.inf)])
    objective = np.concatenate(values)
    found = milp(
        objective / max(float(np.abs(objective).max()), 1e-300),
        constraints=LinearConstraint(vstack([one_a_row, within]), lower, np.concatenate([np.ones(len(values)), most])),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0, "time_limit": _SECONDS},
    )
    if found.x is None:
        why = "no widths keep all limits together" if found.status == _INFEASIBLE else f"unsolved: {found.message}"
        raise InfeasibleError(why)
    if found.status != _OPTIMAL:
        log.warning(f"bits may not be the best: not proven to be in {_SECONDS:g} s ({found.message})")
    ends = np.cumsum([len(row) for row in values])[:-1]
    return [int(np.argmax(x)) for x in np.split(found.x, ends)]


_TOLERANCE = 1e-6
"""Of HiGHS's constraints, which SciPy lets nobody set."""

_TRIES = 20
"""To keep limits exactly; one or two are enough."""

_OPTIMAL, _INFEASIBLE = 0, 2
"""Of SciPy's codes."""

_SECONDS = 60.0
"""After which HiGHS gives the best that it has; problems of hundreds of operations take it a second."""


def _not_dominated(figures: np.ndarray) -> np.ndarray:
    """Of the columns those than which no other one is as good in every row and better in one, int64 indices."""
    kept: list[int] = []
    order = np.lexsort(figures[::-1])  # whatever dominates a column comes before it
    for i in order:
        if not any((figures[:, k] <= figures[:, i]).all() for k in kept):
            kept.append(int(i))
    return np.array(sorted(kept))
