"""Tests of scripts/learned_distance.py: learned scalars next to MSE-optimal ones, and networks that use the latter."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion import calibrate, quantize_model
from qat_runner.quant import Octav, fake_quantize, octav

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "learned_distance.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def batches() -> list[tuple[Tensor]]:
    return [(torch.randn(8, 3, 6, 6),) for _ in range(3)]


@pytest.fixture
def model(batches: list[tuple[Tensor]]) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2), nn.BatchNorm1d(2)
    )
    quantize_model(network, 3, clipping="lsq", first_last_bits=None, example=batches[0][0])
    calibrate(network, batches)
    return network.eval()


def test_rows_against_a_look_at_each_tensor(script: dict[str, Any], model: Any, batches: list[tuple[Tensor]]) -> None:
    with torch.no_grad():
        model[0].weight_quantizer.learned.mul_(1.5)
    rows, best = script["compared"](model, batches, Octav())
    assert [row.tensor for row in rows] == ["0.input", "0.weight", "4.input", "4.weight"]
    wanted = octav(model[0].weight, 3, 0)
    torch.testing.assert_close(best["0.weight"], wanted.detach())
    s = model[0].weight_quantizer.s
    row = rows[1]
    assert (row.bits, row.scalars) == (3, 4)
    assert row.ratio == pytest.approx((s / wanted).log().mean().exp().item())
    errors = [(fake_quantize(model[0].weight, t, 3) - model[0].weight).square().mean().item() for t in (s, wanted)]
    assert (row.mse, row.best_mse) == pytest.approx(tuple(errors))
    assert row.excess_percent == pytest.approx(100 * (errors[0] / errors[1] - 1))
    inputs = torch.stack([octav(x, 3) for (x,) in batches]).mean()
    assert best["0.input"].item() == pytest.approx(inputs.item())


def test_what_is_moved(script: dict[str, Any], model: Any, batches: list[tuple[Tensor]]) -> None:
    _, best = script["compared"](model, batches, Octav())
    learned = {name: q.learned.clone() for name, (_, q) in script["learned"](model).items()}
    for weights, changed in (((), []), ((True,), ["0.weight", "4.weight"]), ((False,), ["0.input", "4.input"])):
        network = script["moved"](model, best, weights)
        network(*batches[0])
        quantizers = {name: q for name, (_, q) in script["learned"](network).items()}
        assert sorted(name for name, q in quantizers.items() if not torch.equal(q.learned, learned[name])) == changed
        for name in changed:
            torch.testing.assert_close(quantizers[name].latest(), best[name])
    assert all(torch.equal(q.learned, learned[name]) for name, (_, q) in script["learned"](model).items())


def test_no_run(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["learned_distance", str(tmp_path)])
    assert script["main"]() == 2
    assert f"learned_distance: {tmp_path}: holds no run" in capsys.readouterr().err
