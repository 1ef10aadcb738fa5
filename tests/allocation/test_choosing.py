"""Tests of the search where narrower bit-widths cost more, as may happen with latencies."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from qat_runner.allocation import Limit, Network, Prices
from qat_runner.config import Config
from qat_runner.errors import RunError
from qat_runner.experiment.bits_record import recorded
from qat_runner.experiment.choosing import Search
from qat_runner.experiment.probing import Probes
from qat_runner.quant import Octav
from tests.allocation.test_solving import WIDTHS, operation
from tests.report.test_pages import config_of

MS = {(2, 2): 1.2, (4, 4): 0.4, (8, 8): 0.8}
"""Milliseconds if there is no kernel for 2 bits, so codes are unpacked first; all other pairs take 1 ms."""


@dataclass
class How:
    latencies: str | None = None
    same: bool = False
    widths: tuple[int, ...] = WIDTHS
    cost: str = "latency_ms"
    price: str = "gradient"


@dataclass
class Asked:
    allocation: How
    max_drop: float | None = 1.0
    asked_bits: str = "budget=5"
    retrain_steps: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    model: Any = field(default_factory=lambda: SimpleNamespace(name="net"))
    dataset: Any = field(default_factory=lambda: SimpleNamespace(name="data"))


@pytest.mark.parametrize(("wanted", "epochs", "each"), [(0, 0, 0), (1000, 3, 334), (390, 1, 390), (391, 2, 196)])
def test_the_steps_that_are_told_are_those_that_are_trained(
    wanted: int, epochs: int, each: int, tmp_path: Path
) -> None:
    (tmp_path / "w.pt").touch()
    probes, asked = probes_of(tmp_path, f"retrain_steps={wanted}")
    probes.network("4 bits", [])
    assert probes.steps == epochs * each
    if wanted:
        assert (asked[-1].epochs, asked[-1].limit_train_batches) == (epochs, each)


def probes_of(folder: Path, *overrides: str) -> tuple[Probes, list[Config]]:
    """Return probes that measure nothing, and the list of configs of the runs that they request."""
    (folder / "w.pt").touch()
    config = config_of("mode=allocate", f"weights={folder / 'w.pt'}", "budget=4", "batch_size=null", *overrides)
    data: Any = SimpleNamespace(train_steps=lambda batch_size: 390)
    asked: list[Config] = []
    found: Any = {"top1": 50.0}
    return Probes(config, config.weights, folder / "probes", lambda config: asked.append(config) or found, data), asked


def test_probes_that_are_retrained_have_the_quantizer_of_that_training(tmp_path: Path) -> None:
    for overrides, method in (
        ([], Octav(warm_iterations=6)),
        (["clipping.refine=8"], Octav(refine=8, warm_iterations=6)),
    ):
        probes, asked = probes_of(tmp_path, "retrain_steps=10", *overrides)
        probes.network("4 bits", [])
        weights = f"weights={tmp_path / 'w.pt'}"
        own = config_of("mode=retrain", weights, *overrides).quantization.tensor("layer1.0.conv1", "Conv2d", "weight")
        probe = asked[-1].quantization.tensor("layer1.0.conv1", "Conv2d", "weight")
        assert asked[-1].mode == "retrain" and probe.clipping == own.clipping == method
    probes, asked = probes_of(tmp_path)
    probes.network("4 bits", [])
    assert asked[-1].mode == "ptq" and asked[-1].clipping_in_mode.refine == 64


def test_codes_of_wide_weights_are_not_watched(tmp_path: Path) -> None:
    """Only the search knows whether all weights have more bits than oscillations.max_bits."""
    watched = ("retrain_steps=10", "oscillations.measure=true", "oscillations.freeze_to=0.01")
    probes, asked = probes_of(tmp_path, *watched)
    for narrowest, watching in ((4, True), (8, False)):
        probes.network("some bits", [{"match": "*", "bits": narrowest}], narrowest)
        assert asked[-1].oscillations.watching == watching


class Foretold:
    """Replaces measurements: a function of the bit-widths of all tensors returns the lost accuracy."""

    steps = 0
    reference: ClassVar[dict[str, float]] = {"top1": 50.0}

    def __init__(self, lost: Callable[[Mapping[str, int]], float]) -> None:
        self.lost = lost

    def network(self, bits: str, rules: Sequence[Mapping[str, Any]], narrowest: int) -> dict[str, float]:
        return {"top1": 50.0 - self.lost({rule["match"]: rule["bits"] for rule in rules})}

    def drop(self, summary: Mapping[str, float]) -> float:
        return 50.0 - summary["top1"]

    def describe(self, summary: Mapping[str, float], after: str = "") -> str:
        return f"{summary['top1']:.0f} %"


EVEN, FLAT, STEEP = (1.0, 0.05, 0.0002), (1e-6, 1e-7, 1e-9), (100.0, 10.0, 0.001)
"""Prices at each of WIDTHS, for three kinds of layers."""


def search_by(how: How, rows: Sequence[Sequence[Sequence[float]]] = ([EVEN],) * 4) -> Search:
    """Return a search over layers of equal size; both operands of a layer have its prices, one row per batch."""
    known = Network(tuple(operation(f"l{i}", 1000, 1000, 1e6) for i in range(len(rows))), 0.0, 0.0)
    names, nothing = [operand.name for operand in known.free], torch.zeros(len(WIDTHS), dtype=torch.float64)
    priced = {name: torch.tensor(rows[int(name[1])], dtype=torch.float64) for name in names}
    config: Any = Asked(how)
    return Search(config, known, Prices("gradient", WIDTHS, priced, dict.fromkeys(names, nothing)), [])


def timed(ms: Mapping[tuple[int, int], float], tmp_path: Path) -> Search:
    """Return a search over four layers by latency; pairs of bit-widths that are not given take 1 ms."""
    pairs = {f"{a}x{b}": ms.get((a, b), 1.0) for a, b in itertools.product(WIDTHS, repeat=2)}
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps({f"l{i}": pairs for i in range(4)}))
    return search_by(How(str(file)))


def figures(search: Search) -> list[tuple[float, float]]:
    (cost,) = search.cost
    return [(cost.total(search.known, found.bits), found.rise) for found in search.front(25)]


@pytest.mark.parametrize("wide", [0.0, 0.8])
def test_a_front_that_begins_at_nothing(wide: float, tmp_path: Path) -> None:
    """Costs that begin at 0 are spaced linearly, because no ratio leads away from 0."""
    ms = dict.fromkeys(itertools.product(WIDTHS, repeat=2), 0.0) | {(8, 8): wide}
    search = timed(ms, tmp_path)
    assert search.range == (0.0, pytest.approx(4 * wide))
    found = figures(search)
    assert found[0][0] == 0 and found[-1] == pytest.approx((4 * wide, 0.0016))


def test_the_front_begins_at_what_costs_least(tmp_path: Path) -> None:
    search = timed(MS, tmp_path)
    (cost,), known = search.cost, search.known
    assert search.range == pytest.approx((1.6, 3.2))
    found = figures(search)
    assert found[0] == pytest.approx((1.6, 0.4)) and found[-1] == pytest.approx((3.2, 0.0016))
    probes: Any = Foretold(lambda bits: sum(search.mean[name][width] for name, width in bits.items()))
    best = search.least(probes).best
    assert cost.total(known, best.bits) == pytest.approx(1.6) and {*best.bits.values()} == {4}


def test_uniform_bits_may_hold_where_no_choice_by_prices_does() -> None:
    """Measured prices need not fall with the bits: here all choices have 4 bits, and only 8 bits everywhere hold."""
    search = search_by(How(cost="mean_bits"), ([(1.0, 0.010, 0.011)],) * 4)
    probes: Any = Foretold(lambda bits: 0.5 if {*bits.values()} == {8} else 1.2)
    chosen = search.least(probes)
    assert chosen.width == 8 and {*chosen.best.bits.values()} == {8}
    nothing: Any = Foretold(lambda bits: 1.2)
    with pytest.raises(RunError, match="even 8 bits everywhere lose more"):
        search_by(How(cost="mean_bits")).least(nothing)


def test_the_fewest_bits_are_those_of_all_networks_on_the_way() -> None:
    """A uniform network may be cheaper than all networks that prices choose."""
    search = search_by(How(cost="mean_bits", widths=(2, 4, 4, 8)), ([STEEP], [EVEN], [FLAT], [FLAT]))
    probes: Any = Foretold(lambda bits: 0.0 if min(bits.values()) >= 4 else 9.0)
    chosen = search.least(probes)
    assert {*chosen.best.bits.values()} == {4} and chosen.width == 4 and search.widths == [2, 4, 8]
    record = recorded(search, chosen, probes, Prices("measured", (4,), {}, {}), 0.0)
    assert record["answer"] == (
        "net on data lives with 4.0 bits (weights), 4.0 bits (activations): 50 %; these are 4 bits everywhere: no "
        "cheaper ones that were measured lose so little"
    )
    assert record["chosen"] == {key: value for key, value in record["uniform"][1].items() if key != "width"}
    assert [point["value"] for point in record["uniform"]] == [41.0, 50.0, 50.0]
    assert record["measured"] and all(point["value"] is not None for point in record["measured"])


def test_the_answer_within_a_budget_does_not_say_that_the_loss_is_small() -> None:
    search = search_by(How(cost="mean_bits"), ([STEEP], [EVEN], [FLAT], [FLAT]))
    search.config.max_drop, search.limits = None, [Limit(measure, 5.0) for measure in search.cost]
    probes: Any = Foretold(lambda bits: 0.0 if {*bits.values()} == {4} else 1.0)
    mixed = search.within_limits(probes)
    even = replace(mixed, best=search.uniform(4), summary=search.measure(probes, search.uniform(4)))
    for chosen, answer in (
        (mixed, "5.0 bits (weights), 5.0 bits (activations): 49 %; uniform with 4 bits: 50 %"),
        (even, "4.0 bits (weights), 4.0 bits (activations): 50 %; these are 4 bits everywhere"),
        (
            replace(mixed, width=None, uniform=None),
            "5.0 bits (weights), 5.0 bits (activations): 49 %; no uniform width keeps budget=5",
        ),
    ):
        record = recorded(search, chosen, probes, Prices("measured", (4,), {}, {}), 0.0)
        assert record["answer"] == f"net on data with budget=5 has {answer}"


@pytest.mark.parametrize(
    ("rows", "stability"),
    [
        # Together, the batches choose 4 bits for both. Half of ten draws hold only one batch, which chooses 8 and 2.
        (([EVEN, FLAT], [FLAT, EVEN]), 1.5),
        (([EVEN, EVEN], [FLAT, FLAT]), 0.0),
        (([EVEN], [FLAT]), None),  # one batch does not show how stable bits are
    ],
)
def test_bits_are_stable_where_batches_agree(rows: Sequence[Any], stability: float | None) -> None:
    search, probes = search_by(How(cost="mean_bits"), rows), Foretold(lambda bits: 0.0)
    search.limits = [Limit(measure, 5.0) for measure in search.cost]
    chosen = search.within_limits(probes)  # type: ignore[arg-type]
    assert recorded(search, chosen, probes, search.prices, 0.0)["stability"] == stability  # type: ignore[arg-type]
