"""The search where bits that are narrower cost more, as latencies may."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_runner.allocation import Network, Prices
from qat_runner.experiment.choosing import Search
from tests.allocation.test_solving import WIDTHS, operation

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
