"""The best bit-widths under limits, found exactly.

This is a multiple-choice knapsack problem, which is solved by integer programming (SciPy's HiGHS).
"""

import ctypes
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np

from qat_runner.allocation.costs import Measure
from qat_runner.allocation.operations import Network

log = logging.getLogger("qat_runner")


class InfeasibleError(ValueError):
    """No bit-widths satisfy the limits, or the solver found none."""


@dataclass(frozen=True)
class Limit:
    """An upper limit on a figure of the network."""

    measure: Measure
    most: float

    def kept(self, network: Network, bits: Mapping[str, int]) -> bool:
        """Whether the bit-widths of a network's tensors, by name, satisfy it."""
        return self.measure.total(network, bits) <= self.most * (1 + _SLACK)


@dataclass(frozen=True)
class Allocation:
    """The bit-width of each tensor of a network."""

    bits: dict[str, int]
    """name of a tensor -> bit-width; it includes the tensors that have no choice"""
    rise: float
    """the predicted increase of the loss, in the unit of the prices"""


def allocate_bits(
    network: Network, prices: Mapping[str, Mapping[int, float]], limits: Sequence[Limit], same: bool = False
) -> Allocation:
    """Return the bit-widths with the least total price that satisfy all limits.

    Args:
        network: see `operations.network`.
        prices: name of a tensor -> bit-width -> price, for all tensors that have a choice.
        limits: upper limits on figures of the network.
        same: whether both operands of an operation must have the same bit-width, if both have a choice.

    Raises:
        InfeasibleError: no bit-widths satisfy the limits, or the solver found none.
        ValueError: a tensor that has a choice has no price.
    """
    if unpriced := [operand.name for operand in network.free if operand.name not in prices]:
        raise ValueError(
            f"{', '.join(unpriced)}: without a price, because no batch or no gradient reaches it: use "
            f"price=measured, which needs no gradient, or rules that set the bit-width"
        )
    if not same and all(limit.measure.by_tensor for limit in limits):
        network = network.by_tensor()
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
                f"{limit.most:g} is too low a limit of {limit.measure.name}: the least possible is "
                f"{_rounded_up(least + limit.measure.rest)}"
            )
    chosen = _solve_apart(values, tables, room + np.abs(room) * _SLACK)
    bits = {
        operand.name: width
        for operation, some, at in zip(network.operations, choices, chosen, strict=True)
        for operand, width in zip(operation.operands, some[at], strict=True)
    }
    return Allocation(bits, float(sum(row[at] for row, at in zip(values, chosen, strict=True))))


def _rounded_up(value: float) -> str:
    """Return a value rounded up to four digits, so that the printed number can be satisfied as a limit."""
    exact = value * (1 - 1e-12)  # sums that have four digits on paper stay as they are
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal_from_float(exact)):.4g}"


def front(
    network: Network,
    prices: Mapping[str, Mapping[int, float]],
    measures: Sequence[Measure],
    limits: Sequence[float],
    same: bool = False,
) -> list[Allocation]:
    """Return the best bit-widths at each of several limits on the same measures, beginning with the tightest.

    Each result is optimal under its limit, so together they are points of the Pareto front.
    """
    found: list[Allocation] = []
    for most in sorted(limits):
        best = allocate_bits(network, prices, [Limit(measure, most) for measure in measures], same)
        if not found or best.bits != found[-1].bits:
            found.append(best)
    return found


def uniform(network: Network, prices: Mapping[str, Mapping[int, float]], width: int) -> Allocation:
    """Return the allocation with the same bit-width for all tensors that have a choice."""
    bits = {
        o.name: width if o.has_choice else o.widths[0] for operation in network.operations for o in operation.operands
    }
    return Allocation(bits, sum(_price(prices, name, w) for name, w in bits.items()))


def _price(prices: Mapping[str, Mapping[int, float]], tensor: str, bits: int) -> float:
    return prices[tensor][bits] if tensor in prices else 0.0


_SLACK = 1e-9
"""Relative tolerance of limits: sums that are equal on paper may differ in their last bits."""


def _solve_apart(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], most: np.ndarray) -> list[int]:
    """As `_solve`, but solves rows that no limit connects as problems of their own, which are much smaller."""
    from scipy.sparse.csgraph import connected_components

    bound = np.array([[np.ptp(row) > 0 for row in table] for table in tables]).reshape(len(tables), len(values))
    _, group = connected_components(bound.T.astype(int) @ bound, directed=False)
    chosen = [0] * len(values)
    for number in np.unique(group):
        rows = np.flatnonzero(group == number).tolist()
        by = np.flatnonzero(bound[:, rows].any(axis=1)).tolist()
        rest = [sum(float(tables[i][row].min()) for row in np.flatnonzero(group != number).tolist()) for i in by]
        some = [[table[row] for row in rows] for table in (values, *(tables[i] for i in by))]
        for row, at in zip(rows, _solve(some[0], some[1:], most[by] - rest), strict=True):
            chosen[row] = at
    return chosen


def _solve(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], most: np.ndarray) -> list[int]:
    """Return one choice per row such that the sum of values is least and that of each table is at most `most`.

    The solver's tolerances are relative to the largest value, so they may hide differences between smaller values.
    Therefore values are counted from the smallest of their row, and choices that alone exceed the sum that was found
    are left out of the next round, which then has a smaller scale.
    """
    excess = [row - row.min() for row in values]
    kept = [np.arange(len(row)) for row in values]
    best, chosen = np.inf, [0] * len(values)
    while True:
        some = [[row[k] for row, k in zip(rows, kept, strict=True)] for rows in (excess, *tables)]
        found = [int(k[at]) for k, at in zip(kept, _solve_once(some[0], some[1:], most), strict=True)]
        total = float(sum(row[at] for row, at in zip(excess, found, strict=True)))
        if not total < best * (1 - _SLACK):
            return chosen
        best, chosen = total, found
        kept = [np.flatnonzero(row <= best) for row in excess]


def _solve_once(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], most: np.ndarray) -> list[int]:
    """As `_solve`, but only as exact as HiGHS is relative to the largest value.

    HiGHS lets a sum exceed its limit by _TOLERANCE times the table's largest cost. If it returns a choice that exceeds
    its limit, the limit is reduced far enough to exclude this choice, but no choice that truly fits.
    """
    kept = [_not_dominated(np.stack([row, *(table[i] for table in tables)])) for i, row in enumerate(values)]
    offered = [row[k] for row, k in zip(values, kept, strict=True)]
    costs = [[row[k] for row, k in zip(table, kept, strict=True)] for table in tables]
    scales = np.array([max(max(float(np.abs(row).max()) for row in cost), 1e-300) for cost in costs])
    scaled = [[row / scale for row in cost] for cost, scale in zip(costs, scales, strict=True)]
    most, less = most / scales, np.zeros(len(costs))
    for _ in range(_TRIES):
        found = _by_highs(offered, scaled, most - less)
        sums = [float(sum(row[at] for row, at in zip(cost, found, strict=True))) for cost in scaled]
        excess = np.array(sums) - most
        if not (excess > 0).any():
            return [int(k[at]) for k, at in zip(kept, found, strict=True)]
        less = np.where(excess > 0, np.maximum(less + excess, _TOLERANCE - excess / 2), less)
    raise InfeasibleError("unsolved: found no bit-widths that satisfy all limits within the solver's tolerance")


def _by_highs(values: Sequence[np.ndarray], tables: Sequence[Sequence[np.ndarray]], most: np.ndarray) -> list[int]:
    """Return one choice per row with the least sum of values such that the sum of each table is at most `most`.

    The costs in the tables are at most 1.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array, vstack

    one_a_row = block_diag([np.ones((1, len(row))) for row in values], format="csr")
    count = one_a_row.shape[1]
    within = csr_array(np.stack([np.concatenate(table) for table in tables])) if tables else csr_array((0, count))
    lower = np.concatenate([np.ones(len(values)), np.full(len(tables), -np.inf)])
    objective = np.concatenate(values)
    with _no_output_of_c():
        found = milp(
            objective / max(float(np.abs(objective).max()), 1e-300),
            constraints=LinearConstraint(
                vstack([one_a_row, within]), lower, np.concatenate([np.ones(len(values)), most])
            ),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0, "time_limit": _SECONDS},
        )
    if found.x is None:
        why = (
            "no bit-widths satisfy all limits together" if found.status == _INFEASIBLE else f"unsolved: {found.message}"
        )
        raise InfeasibleError(why)
    if found.status != _OPTIMAL:
        log.warning(f"the bit-widths may not be the best: not proven within {_SECONDS:g} s ({found.message})")
    ends = np.cumsum([len(row) for row in values])[:-1]
    return [int(np.argmax(x)) for x in np.split(found.x, ends)]


@contextmanager
def _no_output_of_c() -> Iterator[None]:
    """Discard what C code prints, because HiGHS prints a line for its developers whatever its options say."""
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


_TOLERANCE = 1e-6
"""Tolerance of HiGHS's constraints, which SciPy does not let its callers set."""

_TRIES = 20
"""Attempts to satisfy the limits exactly; one or two are enough."""

_OPTIMAL, _INFEASIBLE = 0, 2
"""SciPy's status codes."""

_SECONDS = 60.0
"""Time limit, after which HiGHS returns the best solution that it has; hundreds of operations take it a second."""


def _not_dominated(figures: np.ndarray) -> np.ndarray:
    """Return the indices, int64, of columns that no other column dominates: as good in every row, and better in one."""
    kept: list[int] = []
    order = np.lexsort(figures[::-1])  # whatever dominates a column comes before it
    for i in order:
        if not any((figures[:, k] <= figures[:, i]).all() for k in kept):
            kept.append(int(i))
    return np.array(sorted(kept))
