"""Figure 2: both methods on every tensor of a network, checked against an independent search."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from qat_runner.cli.run import main
from qat_runner.insertion import quantize_model, quantized_tensors
from qat_runner.paper import figure2


def _mse(x: np.ndarray, s: float, bits: int, signed: bool) -> float:
    """Return the MSE of the quantizer, reimplemented in float64."""
    step = s * 2.0 ** (1 - bits) if signed else s * 2.0**-bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return float(np.mean((x - step * np.clip(np.round(x / step), low, high)) ** 2))


@pytest.mark.parametrize("signed", [True, False])
def test_the_sweep_is_a_search_by_brute_force(signed: bool) -> None:
    model = quantize_model(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), example=torch.randn(16, 8))
    tensor = next(t for t in quantized_tensors(model) if t.tensor == "input" and t.quantizer.format.signed == signed)
    x = torch.randn(4000) if signed else torch.randn(4000).relu()
    for row in figure2.compare(tensor, x):
        values = x.double().numpy()
        candidates = np.abs(values).max() * np.arange(1, 101) / 100
        costs = [_mse(values, s, row.bits, signed) for s in candidates]
        assert row.sweep == pytest.approx(candidates[int(np.argmin(costs))], rel=1e-5)
        assert row.sweep_mse == pytest.approx(min(costs), rel=1e-4)
        assert row.octav_mse == pytest.approx(_mse(values, row.octav, row.bits, signed), rel=1e-3)
        assert row.octav_mse < 1.15 * row.sweep_mse


def test_rows_of_a_weight_are_swept_one_by_one() -> None:
    model = quantize_model(nn.Sequential(nn.Conv2d(3, 5, 3)), first_last_bits=None)
    tensor = next(t for t in quantized_tensors(model) if t.tensor == "weight")
    x = torch.randn(5, 3, 3, 3) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.5]).reshape(5, 1, 1, 1)
    for row in figure2.compare(tensor, x):
        best = []
        for values in x.double().numpy():
            candidates = np.abs(values).max() * np.arange(1, 101) / 100
            best.append(min((_mse(values, s, row.bits, True), s) for s in candidates))
        assert row.sweep_mse == pytest.approx(np.mean([cost for cost, _ in best]), rel=1e-4)
        assert row.sweep == pytest.approx(np.mean([s for _, s in best]), rel=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    options = ["epochs=1", "limit_train_batches=2", "limit_val_batches=1", "batch_size=16", "backend=eager"]
    assert main(["model=resnet20", *options, f"run_dir={folder}"]) == 0
    return folder


def test_all_weights_and_activations_of_a_run_at_both_bit_widths(run: Path) -> None:
    rows = figure2.of_run(run)
    assert [(row.kind, row.bits) for row in rows].count(("weight", 4)) == 20
    assert [(row.kind, row.bits) for row in rows].count(("activation", 8)) == 20
    assert len(rows) == 2 * (20 + 20)
    figure = figure2.draw(rows)
    for ax in figure.axes:  # the sweep is solid, OCTAV dashed
        assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
        assert all(len(line.get_ydata()) == 20 for line in ax.lines)
    plt.close(figure)
    written = list(csv.DictReader(figure2.table(rows).splitlines()))
    assert [row["tensor"] for row in written] == [row.tensor for row in rows]


def test_from_weights_alone_it_is_the_half_of_the_weights_and_with_data_all(run: Path) -> None:
    weights = str(run / "checkpoints" / "last.pt")
    of_run = {(row.tensor, row.bits): row for row in figure2.of_run(run) if row.kind == "weight"}
    alone = figure2.of_weights("resnet20", weights, "digits", None)
    assert {(row.tensor, row.bits) for row in alone} == {*of_run}
    for row in alone:
        theirs = of_run[row.tensor, row.bits]
        assert (row.sweep, row.octav) == pytest.approx((theirs.sweep, theirs.octav), rel=1e-5)
        assert (row.sweep_mse, row.octav_mse) == pytest.approx((theirs.sweep_mse, theirs.octav_mse), rel=1e-5)
    figure = figure2.draw(alone)
    assert len(figure.axes) == 2
    plt.close(figure)
    with_data = figure2.of_weights("resnet20", weights, "digits", run)  # digits come with scikit-learn
    assert len(with_data) == 2 * (20 + 20)
