import csv

import matplotlib.pyplot as plt
import pytest
import torch

from qat_runner.paper.figure5 import Input, apart_most, draw, minima, mse_curve, table, view
from qat_runner.paper.tensor_figures import Sample
from qat_runner.quant import fake_quantize, mse_sweep, octav


@pytest.fixture
def two_minima() -> Sample:
    """Appendix G: a few outliers give the measured MSE a second minimum, which suits only the outliers."""
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


def _input(name: str, octav_s: float, *sweep: float) -> Input:
    return Input(name, True, 1, [octav_s] * len(sweep), [*sweep])


def test_static_scalars_are_means_over_batches_and_the_two_layers_furthest_apart_are_chosen() -> None:
    inputs = [_input("a", 2.0, 2.0), _input("b", 2.0, 7.0, 9.0), _input("c", 2.0, 2.2), _input("d", 2.0, 1.0)]
    assert (inputs[1].static_octav, inputs[1].static_sweep, inputs[1].ratio) == (2.0, 8.0, 4.0)
    assert [each.name for each in apart_most(inputs)] == ["b", "d"]


def test_the_figure_has_a_colour_for_each_batch_and_octavs_scalar_in_each(two_minima: Sample) -> None:
    inputs = [_input("plain", 2.0, 2.0), Input("outliers", True, 2, [7.9] * 10, [350.0] * 10)]
    views = {"plain": [view(Sample("plain", torch.randn(1000), True), 4)] * 3, "outliers": [view(two_minima, 4)] * 10}
    figure = draw(inputs, views)
    both, density, other_density, cost, other_cost = figure.axes
    assert [list(line.get_ydata()) for line in both.lines] == [[2.0, 7.9], [2.0, 350.0]]
    assert (density.get_title(), other_density.get_title()) == ("layer 0, plain", "layer 1, outliers")
    for ax, batches in ((density, 3), (other_density, 10)):
        assert len({line.get_color() for line in ax.lines}) == len(ax.patches) == batches
    marks = [line for line in other_cost.lines if line.get_marker() == "o"]
    assert len(marks) == len({line.get_color() for line in marks}) == 10
    for line in marks:
        assert line.get_xdata()[0] == pytest.approx(7.9, abs=0.1)
        by_hand = (two_minima.x - fake_quantize(two_minima.x, line.get_xdata()[0], 4)).square().mean().item()
        assert line.get_ydata()[0] == pytest.approx(by_hand, rel=1e-4)
    assert len(cost.lines) == 2 * 3
    plt.close(figure)
    (_, second) = csv.DictReader(table(inputs).splitlines())
    assert (second["layer"], second["tensor"], second["minima_of_mse"]) == ("1", "outliers", "2")
    assert float(second["ratio"]) == pytest.approx(44.3, rel=0.01)
