"""The search where bits that are narrower cost more, as latencies may."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat_runner.allocation import Network, Prices
from qat_runner.config import Config
from qat_runner.experiment.choosing import Search
from qat_runner.experiment.probing import Probes
from qat_runner.quant import Octav
from tests.allocation.test_solving import WIDTHS, operation
from tests.report.test_pages import config_of

MS = {(2, 2): 1.2, (4, 4): 0.4, (8, 8): 0.8}
"""No kernel for 2 bits, whose codes are unpacked first; 1 ms for all other pairs."""


@dataclass
class How:
    latencies: str
    same: bool = False
    widths: tuple[int, ...] = WIDTHS
    cost: str = "latency_ms"


@dataclass
class Asked:
    allocation: How
    max_drop: float = 1.0
    retrain_steps: int = 0
    limits: dict[str, float] = field(default_factory=dict)


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
    """Of a network that is measured in no time, and the runs that it is measured by, as they are asked for."""
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
    """Where all have more than oscillations.max_bits, which only the search knows."""
    watched = ("retrain_steps=10", "oscillations.measure=true", "oscillations.freeze_to=0.01")
    probes, asked = probes_of(tmp_path, *watched)
    for narrowest, watching in ((4, True), (8, False)):
        probes.network("some bits", [{"match": "*", "bits": narrowest}], narrowest)
        assert asked[-1].oscillations.watching == watching


class Foretold:
    """In place of measurements."""

    def drop(self, rise: float) -> float:
        return rise


def search_by(ms: Mapping[tuple[int, int], float], tmp_path: Path) -> Search:
    """Among four layers alike, by latencies; 1 ms for pairs of bits that they do not name."""
    known = Network(tuple(operation(f"l{i}", 1000, 1000, 1e6) for i in range(4)), 0.0, 0.0)
    pairs = {f"{a}x{b}": ms.get((a, b), 1.0) for a, b in itertools.product(WIDTHS, repeat=2)}
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps({op.layer: pairs for op in known.operations}))
    price, nothing = (torch.tensor(row, dtype=torch.float64) for row in ([[1.0, 0.05, 0.0002]], [0.0, 0.0, 0.0]))
    names = [operand.name for operand in known.free]
    prices = Prices("gradient", WIDTHS, dict.fromkeys(names, price), dict.fromkeys(names, nothing))
    config: Any = Asked(How(str(file)))
    return Search(config, known, prices, [])


def figures(search: Search) -> list[tuple[float, float]]:
    (cost,) = search.cost
    return [(cost.total(search.known, found.bits), found.rise) for found in search.front(25)]


@pytest.mark.parametrize("wide", [0.0, 0.8])
def test_a_front_that_begins_at_nothing(wide: float, tmp_path: Path) -> None:
    """Costs from 0 on are evenly apart: no ratio leads away from there."""
    ms = dict.fromkeys(itertools.product(WIDTHS, repeat=2), 0.0) | {(8, 8): wide}
    search = search_by(ms, tmp_path)
    assert search.range == (0.0, pytest.approx(4 * wide))
    found = figures(search)
    assert found[0][0] == 0 and found[-1] == pytest.approx((4 * wide, 0.0016))


def test_the_front_begins_at_what_costs_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_by(MS, tmp_path)
    (cost,), known = search.cost, search.known
    assert search.range == pytest.approx((1.6, 3.2))
    found = figures(search)
    assert found[0] == pytest.approx((1.6, 0.4)) and found[-1] == pytest.approx((3.2, 0.0016))
    monkeypatch.setattr(Search, "measure", lambda self, probes, found, said=None: found.rise)
    probes: Any = Foretold()
    best = search.least(probes).best
    assert cost.total(known, best.bits) == pytest.approx(1.6) and {*best.bits.values()} == {4}
