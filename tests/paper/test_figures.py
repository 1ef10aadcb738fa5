"""Figures 1 and 3 and the plot of the iteration: their lines, checked against definitions in NumPy and float64."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from qat_runner.paper.tensor_figures import POINTS, Sample, figure1, figure3, iterations, three_of
from tests.quant.oracles import octav_by_sorting

SAMPLES = [
    Sample("weights", torch.randn(3000, generator=torch.Generator().manual_seed(0)), True),
    Sample("after ReLU", torch.randn(3000, generator=torch.Generator().manual_seed(1)).relu(), False),
]


@pytest.fixture(autouse=True)
def _closed() -> None:
    plt.close("all")


def lines(ax: Axes) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return x and y of each line, by label."""
    return {str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in ax.lines}


def noise(sample: Sample, bits: int) -> float:
    """Return the paper's k."""
    return float(4.0**-bits / (3 if sample.signed else 12))


def test_figure_1_is_the_model_and_what_quantizers_do_around_the_best_scalar() -> None:
    axes = figure1(SAMPLES).axes
    assert [ax.get_title() for ax in axes] == [f"{s.name}, {bits} bits" for s in SAMPLES for bits in (4, 6, 8)]
    for ax, (sample, bits) in zip(axes, ((s, b) for s in SAMPLES for b in (4, 6, 8)), strict=True):
        found, x = lines(ax), sample.x.double().numpy()
        best = octav_by_sorting(sample.x.double(), noise(sample, bits))
        (star,) = (name for name in found if name.startswith("s* = "))
        assert float(star.removeprefix("s* = ")) == pytest.approx(best, rel=5e-3)
        assert found[star][0] == pytest.approx([best, best], rel=1e-4)

        at, modelled = found["J(s)"]
        assert len(at) == POINTS and at[-1] == pytest.approx(np.abs(x).max())
        over = [np.clip(np.abs(x) - s, 0, None) for s in at]
        inside = [((x != 0) & (np.abs(x) <= s)).sum() for s in at]
        expected = [(noise(sample, bits) * s**2 * n + o @ o) / x.size for s, n, o in zip(at, inside, over, strict=True)]
        assert modelled == pytest.approx(expected, rel=1e-3)
        at, real = found["measured"]
        step = at / 2 ** (bits - sample.signed)  # this format has no code at s
        ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sample.signed else (0, 2**bits - 1)
        by_hand = [np.mean((np.clip(np.round(x / d), *ends) * d - x) ** 2) for d in step]
        assert real == pytest.approx(by_hand, rel=1e-2)


def test_figure_3_is_the_factors_of_the_estimators() -> None:
    found = {ax.get_title(): lines(ax) for ax in figure3().axes}
    assert [*found] == ["STE", "PWL", "MAD"]
    for name, of_one in found.items():
        ((x, factor),) = of_one.values()
        inside = np.abs(x) <= 1
        outside = {"STE": np.ones_like(x), "PWL": np.zeros_like(x), "MAD": 1 / np.maximum(np.abs(x), 1)}[name]
        assert len(x) == 601 and factor == pytest.approx(np.where(inside, 1, outside), rel=1e-6)


def test_the_iteration_is_the_published_one_from_every_start() -> None:
    for ax, sample in zip(iterations(SAMPLES, steps=6).axes, SAMPLES, strict=False):
        found, x = lines(ax), np.abs(sample.x.double().numpy())
        best = found.pop("s*")[1]
        assert best == pytest.approx([octav_by_sorting(sample.x.double(), noise(sample, 4))] * 2, rel=1e-4)
        assert [*found] == ["0", "max", "3 sigma", "4 sigma", "5 sigma"]
        for n, path in found.values():
            assert n.tolist() == list(range(7))
            for before, after in itertools.pairwise(path):
                out = x > before
                inside = ((x > 0) & ~out).sum()
                assert after == pytest.approx(x[out].sum() / (noise(sample, 4) * inside + out.sum()), rel=1e-5)
        starts = [path[0] for _, path in found.values()]
        deviation = float(sample.x.double().std())
        assert starts == pytest.approx([0, x.max(), 3 * deviation, 4 * deviation, 5 * deviation], rel=1e-5)


def test_the_layers_of_figure_1_are_the_second_one_in_the_middle_and_the_last_but_one() -> None:
    assert three_of("abcdefgh") == {"b", "e", "g"} and three_of("a") == {"a"} and three_of("") == set()
