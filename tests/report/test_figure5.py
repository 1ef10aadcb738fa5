import csv

import matplotlib.pyplot as plt
import pytest
import torch

from qat_runner.quant import mse_sweep, octav
from qat_runner.report.figure5 import Scalars, draw, minima, mse_curve, table
from qat_runner.report.figures_of_paper import Sample


@pytest.fixture
def two_minima() -> Sample:
    """Appendix G: a few outliers give the measured MSE a second minimum, which caters for them alone."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[:3] = 350.0
    return Sample("outliers", x, True)


def test_octav_goes_to_the_first_minimum_and_the_sweep_to_the_second(two_minima: Sample) -> None:
    assert octav(two_minima.x, 4).item() == pytest.approx(7.9, abs=0.1)
    assert mse_sweep(two_minima.x, 4).item() == pytest.approx(350)
    candidates, curve = mse_curve(two_minima, 4)
    assert minima(curve) == 2
    assert candidates[99] == 350 and curve[99] == min(curve)
    plain = Sample("plain", two_minima.x[3:], True)
    assert minima(mse_curve(plain, 4)[1]) == 1


def test_minima() -> None:
    assert [minima(curve) for curve in ([3, 2, 1], [1, 2, 3], [1, 2, 1], [2, 1, 2, 1, 3], [1.0])] == [1, 1, 2, 2, 1]


def test_the_figure_shows_where_they_part_most(two_minima: Sample) -> None:
    rows = [Scalars(Sample(f"t{i}", torch.randn(1000), True), octav=2.0, sweep=2.0 + i / 10) for i in range(4)]
    rows.insert(1, Scalars(two_minima, octav=7.9, sweep=350.0))
    figure = draw(rows)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[1:4] == ["outliers", "2 minima", "t3"]
    plt.close(figure)
    (first, *_) = csv.DictReader(table(rows[1:]).splitlines())
    assert (first["tensor"], first["minima_of_mse"], float(first["ratio"])) == (
        "outliers",
        "2",
        pytest.approx(44.3, 0.01),
    )
