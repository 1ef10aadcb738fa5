"""Tests of the best bit-widths under limits, compared with trying all bit-widths one by one."""

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_runner.allocation import (
    COSTS,
    InfeasibleError,
    Limit,
    Measure,
    Network,
    Operand,
    Operation,
    allocate_bits,
    front,
    latency_ms,
    uniform,
)

WIDTHS = (2, 4, 8)


def operation(name: str, weights: int, inputs: int, macs: float, widths: tuple[int, ...] = WIDTHS) -> Operation:
    operands = Operand(f"{name}.weight", True, weights, widths), Operand(f"{name}.input", False, inputs, widths)
    return Operation(name, operands, macs)


NETWORK = Network(
    (operation("a", 100, 50, 1e9), operation("b", 300, 20, 2e9, (8,)), operation("c", 10, 500, 3e9)), 0.5, 1e9
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Network, dict[str, dict[int, float]]]:
    sizes, prices = st.integers(1, 1000), st.floats(-1, 10, allow_nan=False)
    count = draw(st.integers(1, 3))
    operations = [operation(str(i), draw(sizes), draw(sizes), draw(sizes)) for i in range(count)]
    names = [o.name for op in operations for o in op.operands]
    return Network(tuple(operations), 0.0, 0.0), {n: {w: draw(prices) for w in WIDTHS} for n in names}


@settings(max_examples=40)
@given(problems(), st.sampled_from(sorted(COSTS)), st.floats(0, 1), st.booleans())
def test_no_other_choice_of_widths_is_better(
    problem: tuple[Network, dict[str, dict[int, float]]], cost: str, share: float, same: bool
) -> None:
    network, prices = problem
    measures = COSTS[cost](network)
    ends = [[m.total(network, uniform(network, prices, w).bits) for m in measures] for w in (2, 8)]
    limits = [Limit(m, low + share * (high - low)) for m, low, high in zip(measures, *ends, strict=True)]
    found = allocate_bits(network, prices, limits, same)
    assert all(limit.kept(network, found.bits) for limit in limits)
    names = [operand.name for operand in network.free]
    best = min(
        sum(prices[n][w] for n, w in zip(names, widths, strict=True))
        for widths in itertools.product(WIDTHS, repeat=len(names))
        if all(limit.kept(network, dict(zip(names, widths, strict=True))) for limit in limits)
        and not (same and any(a != b for a, b in zip(widths[::2], widths[1::2], strict=True)))
    )
    assert found.rise == pytest.approx(best, abs=1e-9)
    assert found.rise == pytest.approx(sum(prices[n][found.bits[n]] for n in names))


def falling(network: Network) -> dict[str, dict[int, float]]:
    """Return prices that decrease with the bit-width, as noise does."""
    return {operand.name: {w: (i + 1) * 4.0**-w for w in WIDTHS} for i, operand in enumerate(network.free)}


@pytest.mark.parametrize(
    ("cost", "wanted"),
    [
        ("mean_bits", [(100 * 2 + 10 * 8) / 110, (50 * 4 + 500 * 2) / 550]),
        ("size_mb", [0.5 + (100 * 2 + 300 * 8 + 10 * 8) / 8e6]),
        ("bitops", [1 * 32 * 32 + 1 * 2 * 4 + 2 * 8 * 8 + 3 * 8 * 2]),
        ("traffic_mb", [(100 * 2 + 50 * 4 + 300 * 8 + 20 * 8 + 10 * 8 + 500 * 2) / 8e6]),
    ],
)
def test_costs_are_sums_over_operations(cost: str, wanted: list[float]) -> None:
    bits = {"a.weight": 2, "a.input": 4, "b.weight": 8, "b.input": 8, "c.weight": 8, "c.input": 2}
    assert [m.total(NETWORK, bits) for m in COSTS[cost](NETWORK)] == pytest.approx(wanted)


def test_what_a_rule_says_stays() -> None:
    found = allocate_bits(NETWORK, falling(NETWORK), [Limit(m, 3.0) for m in COSTS["mean_bits"](NETWORK)])
    assert (found.bits["b.weight"], found.bits["b.input"]) == (8, 8)
    assert {operand.name for operand in NETWORK.free} == {"a.weight", "a.input", "c.weight", "c.input"}


@pytest.mark.parametrize("cost", sorted(COSTS))
def test_the_front_goes_from_the_narrowest_widths_to_the_widest(cost: str) -> None:
    prices, measures = falling(NETWORK), COSTS[cost](NETWORK)
    ends = [max(m.total(NETWORK, uniform(NETWORK, prices, w).bits) for m in measures) for w in (2, 8)]
    points = front(NETWORK, prices, measures, np.linspace(*ends, 20).tolist())
    rises = [point.rise for point in points]
    assert rises == sorted(rises, reverse=True) and len(points) > 2
    for point, width in ((points[0], 2), (points[-1], 8)):
        paid = [
            operand.name for operand in NETWORK.free if operand.weight or cost != "size_mb"
        ]  # inputs are not stored
        assert {point.bits[name] for name in paid} == {width}


def test_a_uniform_network_keeps_a_budget_of_its_bits() -> None:
    prices = falling(NETWORK)
    limits = [Limit(m, 4.0) for m in COSTS["mean_bits"](NETWORK)]
    same_bits = uniform(NETWORK, prices, 4)
    assert all(limit.kept(NETWORK, same_bits.bits) for limit in limits)
    assert allocate_bits(NETWORK, prices, limits).rise <= same_bits.rise


def test_limits_are_kept_more_closely_than_the_solver_does() -> None:
    """In this problem, the choice that is better within the solver's tolerance exceeds 4 bits by 7e-7."""
    draw, widths = np.random.default_rng(5), tuple(range(2, 9))
    sizes = [draw.integers(1, 2_000_000 if i == 0 else 2000, 2).tolist() for i in range(40)]
    network = Network(tuple(operation(str(i), *two, 1e6, widths) for i, two in enumerate(sizes)), 0.0, 0.0)
    prices = {o.name: {w: float(draw.lognormal(0, 2)) * 4.0**-w for w in widths} for o in network.free}
    limits = [Limit(m, 4.0) for m in COSTS["mean_bits"](network)]
    found = allocate_bits(network, prices, limits)
    assert all(limit.kept(network, found.bits) for limit in limits)
    assert 0.0464 < found.rise < 0.0465  # the best choice that satisfies the limits exactly


def test_a_limit_below_the_narrowest_is_refused() -> None:
    limits = [Limit(m, 1.5) for m in COSTS["mean_bits"](NETWORK)]
    with pytest.raises(
        InfeasibleError, match=r"1\.5 is too low a limit of mean bits of weights: the least possible is 2"
    ):
        allocate_bits(NETWORK, falling(NETWORK), limits)


@pytest.mark.parametrize("stored", [0.0077141, 0.0077149, 0.0077, 12345.6])
def test_what_is_told_of_the_narrowest_can_be_kept(stored: float) -> None:
    network = Network((operation("a", 0, 50, 1e9),), stored, 0.0)
    (measure,) = COSTS["size_mb"](network)
    with pytest.raises(InfeasibleError, match="least possible") as refused:
        allocate_bits(network, falling(network), [Limit(measure, 0.001)])
    line = float(str(refused.value).rpartition(" ")[2])
    allocate_bits(network, falling(network), [Limit(measure, line)])
    assert stored <= line * (1 + 1e-9) and line < stored * 1.001


def test_a_choice_that_is_not_proven_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    limits = [Limit(m, 4.0) for m in COSTS["mean_bits"](NETWORK)]

    def stopped(*args: object, **kwargs: object) -> object:
        found = milp(*args, **kwargs)
        found.status, found.message = 1, "Time limit reached."
        return found

    milp = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", stopped)
    allocate_bits(NETWORK, falling(NETWORK), limits)
    assert "the bit-widths may not be the best: not proven within 60 s (Time limit reached.)" in caplog.text


def test_limits_that_cannot_be_kept_together_are_refused() -> None:
    def of(sign: float) -> Callable[..., float]:
        return lambda operation, widths: sign * sum(widths)

    limits = [Limit(Measure("few", of(1)), 30.0), Limit(Measure("many", of(-1)), -40.0)]
    with pytest.raises(InfeasibleError, match="together"):
        allocate_bits(NETWORK, falling(NETWORK), limits)


def test_latencies_are_added_up_and_must_be_whole() -> None:
    pairs = list(itertools.product(WIDTHS, repeat=2))
    table = {"a": {p: p[0] + p[1] for p in pairs}, "b": {(8, 8): 3.0}, "c": dict.fromkeys(pairs, 0.5)}
    (measure,) = latency_ms(NETWORK, table)
    bits = {"a.weight": 2, "a.input": 4, "b.weight": 8, "b.input": 8, "c.weight": 8, "c.input": 2}
    assert measure.total(NETWORK, bits) == 9.5
    with pytest.raises(ValueError, match="c lacks 2x2 bits"):
        latency_ms(NETWORK, {**table, "c": {(8, 8): 1.0}})
    with pytest.raises(ValueError, match="has no entry for c"):
        latency_ms(NETWORK, {"a": table["a"], "b": table["b"]})


def exact(operands: list[Operand], prices: dict[str, dict[int, float]], mean: float) -> float:
    """Return the least total price of tensors within an average bit-width, by dynamic programming over bits spent."""
    room = int(mean * sum(o.elements for o in operands) + 1e-6)
    best = np.full(room + 1, np.inf)
    best[0] = 0
    for operand in operands:
        after = np.full(room + 1, np.inf)
        for width, cost in prices[operand.name].items():
            spent = operand.elements * width
            after[spent:] = np.minimum(after[spent:], best[: max(room + 1 - spent, 0)] + cost)
        best = after
    return float(best.min())


@pytest.mark.parametrize("sensitive", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("mean", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_one_sensitive_tensor_hides_no_other(sensitive: float, mean: int) -> None:
    """The solver's tolerances are relative to the largest price."""
    draw, widths = np.random.default_rng(0), tuple(range(2, 17))
    sizes = draw.integers(10, 200, (8, 2))
    network = Network(tuple(operation(str(i), int(a), int(b), 1, widths) for i, (a, b) in enumerate(sizes)), 0, 0)
    scale = {o.name: sensitive if i == 0 else float(draw.lognormal(0, 2)) for i, o in enumerate(network.free)}
    prices = {name: {w: each * 4.0**-w for w in widths} for name, each in scale.items()}
    found = allocate_bits(network, prices, [Limit(m, mean) for m in COSTS["mean_bits"](network)])
    best = [exact([o for o in network.free if o.weight == kind], prices, mean) for kind in (True, False)]
    assert found.rise == pytest.approx(sum(best), rel=1e-9)


def test_what_has_no_price_is_named() -> None:
    prices = falling(NETWORK)
    del prices["c.input"]
    with pytest.raises(ValueError, match=r"c\.input: without a price, because no batch or no gradient reaches it"):
        allocate_bits(NETWORK, prices, [])


def test_of_the_same_bits_no_other_latencies_are_asked_for() -> None:
    table = {name: {(w, w): float(w) for w in WIDTHS} for name in "abc"}
    (measure,) = latency_ms(NETWORK, table, same=True)
    found = allocate_bits(NETWORK, falling(NETWORK), [Limit(measure, 16.0)], same=True)
    assert measure.total(NETWORK, found.bits) <= 16.0
    with pytest.raises(ValueError, match="a lacks 2x4 bits"):
        latency_ms(NETWORK, table)


def test_the_solver_prints_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    solve, libc = scipy.optimize.milp, ctypes.CDLL(None)

    def talkative(*args: Any, **options: Any) -> Any:
        libc.puts(b"tmpSolver.run();")
        return solve(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", talkative)
    libc.puts(b"before")
    allocate_bits(NETWORK, falling(NETWORK), [])
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]


def test_tensors_that_no_limit_connects_are_solved_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far fewer variables than all pairs of bit-widths of an operation: one for each bit-width of a tensor."""
    solve, sizes = scipy.optimize.milp, []

    def counted(objective: np.ndarray, *args: Any, **options: Any) -> Any:
        sizes.append(len(objective))
        return solve(objective, *args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", counted)
    widths = tuple(range(2, 9))
    many = Network(tuple(operation(str(i), 10 + i, 20 + i, 1.0, widths) for i in range(5)), 0, 0)
    prices = {o.name: {w: (i + 1) * 4.0**-w for w in widths} for i, o in enumerate(many.free)}
    alike = uniform(many, prices, 4)
    for cost, most in (("mean_bits", 5 * 7), ("size_mb", 5 * 7), ("traffic_mb", 10 * 7)):
        sizes.clear()
        allocate_bits(many, prices, [Limit(m, m.total(many, alike.bits)) for m in COSTS[cost](many)])
        assert 10 < max(sizes) <= most


def test_a_hundred_operations_take_a_moment() -> None:
    draw = np.random.default_rng(0)
    widths = tuple(range(2, 9))
    many = Network(
        tuple(operation(str(i), *map(int, draw.integers(1e3, 1e6, 2)), 1e6, widths) for i in range(100)), 0, 0
    )
    prices = {o.name: {w: float(draw.lognormal()) * 4.0**-w for w in widths} for o in many.free}
    limits = [Limit(m, 4.0) for m in COSTS["mean_bits"](many)]
    found = allocate_bits(many, prices, limits)
    assert found.rise < uniform(many, prices, 4).rise and all(limit.kept(many, found.bits) for limit in limits)
