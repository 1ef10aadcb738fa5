"""The search where bits that are narrower cost more, as latencies may."""

import itertools
import json
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
    config = config_of("mode=allocate", f"weights={tmp_path / 'w.pt'}", "budget=4", f"retrain_steps={wanted}")
    data: Any = SimpleNamespace(train_steps=lambda batch_size: 390)
    asked: list[Config] = []
    found: Any = {"top1": 50.0}
    probes = Probes(config, config.weights, tmp_path / "probes", lambda config: asked.append(config) or found, data)
    probes.network([])
    assert probes.steps == epochs * each
    if wanted:
        assert (asked[-1].epochs, asked[-1].limit_train_batches) == (epochs, each)


class Foretold:
    """In place of measurements."""

    def drop(self, rise: float) -> float:
        return rise


def test_the_front_begins_at_what_costs_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Network(tuple(operation(f"l{i}", 1000, 1000, 1e6) for i in range(4)), 0.0, 0.0)
    pairs = {f"{a}x{b}": MS.get((a, b), 1.0) for a, b in itertools.product(WIDTHS, repeat=2)}
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps({op.layer: pairs for op in known.operations}))
    price, nothing = (torch.tensor(row, dtype=torch.float64) for row in ([[1.0, 0.05, 0.0002]], [0.0, 0.0, 0.0]))
    names = [operand.name for operand in known.free]
    prices = Prices("gradient", WIDTHS, dict.fromkeys(names, price), dict.fromkeys(names, nothing))
    config: Any = Asked(How(str(file)))
    search = Search(config, known, prices, [])
    assert search.range == pytest.approx((1.6, 3.2))
    (cost,) = search.cost
    figures = [(cost.total(known, found.bits), found.rise) for found in search.front(25)]
    assert figures[0] == pytest.approx((1.6, 0.4)) and figures[-1] == pytest.approx((3.2, 0.0016))
    monkeypatch.setattr(Search, "measure", lambda self, probes, found: found.rise)
    probes: Any = Foretold()
    best = search.least(probes).best
    assert cost.total(known, best.bits) == pytest.approx(1.6) and {*best.bits.values()} == {4}
