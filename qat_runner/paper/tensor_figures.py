"""Figures of single tensors and of functions: figures 1 and 3 of the paper, and the plot of the iteration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from qat_runner.insertion import QuantizedTensor, quantized_tensors
from qat_runner.paper.figures import grid
from qat_runner.paper.tensors_of_run import look_at, network_of_run
from qat_runner.quant import IntFormat, expected_mse, fake_quantize, mse, newton_step, octav
from qat_runner.training.plots import CHOSEN, OTHER

POINTS = 120
"""Number of clipping scalars at which a curve of figure 1 is evaluated."""


@dataclass(frozen=True)
class Sample:
    """A tensor to plot."""

    name: str
    x: Tensor
    signed: bool

    def format(self, bits: int) -> IntFormat:
        """Return the integer format of the tensor at a bit-width."""
        return IntFormat(bits, self.signed)


def synthetic_samples() -> list[Sample]:
    """Return tensors drawn from known distributions, 10^5 elements each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator)
    laplace = x.sign() * torch.empty(100_000).exponential_(generator=generator)
    return [
        Sample("Gaussian", x, True),
        Sample("Laplace", laplace, True),
        Sample("Gaussian after ReLU", x.relu(), False),
    ]


def samples_of_run(folder: Path) -> list[Sample]:
    """Return weights and activations of three layers of a run's network (see `three_of`), on training data.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    model, data, _ = network_of_run(folder)
    chosen = three_of(list(dict.fromkeys(t.layer for t in quantized_tensors(model))))
    samples = []

    def keep(tensor: QuantizedTensor, x: Tensor) -> None:
        if tensor.layer in chosen:
            samples.append(Sample(tensor.name, x.flatten(), tensor.quantizer.format.signed))

    look_at(model, data, 32, 1, keep)
    return samples


def three_of(layers: Sequence[str]) -> set[str]:
    """Return the second, the middle and the second-to-last layer; of one or two layers, all."""
    count = len(layers)
    return {layers[i] for i in (min(1, count - 1), count // 2, max(count - 2, 0)) if count}


def figure1(samples: Sequence[Sample]) -> Figure:
    """Plot MSE against s at 4, 6 and 8 bits: the model J(s), the measured MSE of the quantizer, and OCTAV's s*."""
    all_bits = (4, 6, 8)
    figure, axes = grid(len(samples), len(all_bits))
    for row, sample in zip(axes, samples, strict=True):
        top = sample.x.abs().max().item()
        for ax, bits in zip(row, all_bits, strict=True):
            best = octav(sample.x, sample.format(bits)).item()
            candidates = torch.linspace(0.15 * best, top, POINTS).tolist()
            modelled = [expected_mse(sample.x, s, sample.format(bits)).item() for s in candidates]
            real = [mse(sample.x, fake_quantize(sample.x, s, sample.format(bits))).item() for s in candidates]
            ax.plot(candidates, real, color=CHOSEN, label="measured")
            ax.plot(candidates, modelled, color=OTHER, linestyle="--", label="J(s)")
            ax.axvline(best, color="black", linewidth=1, label=f"s* = {best:.3g}")
            ax.set(yscale="log", title=f"{sample.name}, {bits} bits", xlabel="s", ylabel="MSE")
            ax.legend(fontsize=7)
    return figure


def iterations(samples: Sequence[Sample], bits: int = 4, steps: int = 10) -> Figure:
    """Plot s_n of the published iteration, started from 0, the maximum and 3, 4, 5 standard deviations (section 3)."""
    columns = 3
    figure, axes = grid(-(-len(samples) // columns), columns)
    for ax, sample in zip([ax for row in axes for ax in row], samples, strict=False):
        deviation = sample.x.std().item()
        starts = {"0": 0.0, "max": sample.x.abs().max().item(), **{f"{n} sigma": n * deviation for n in (3, 4, 5)}}
        for label, start in starts.items():
            path = [torch.tensor(start, dtype=torch.float64)]
            for _ in range(steps):
                path.append(newton_step(sample.x, path[-1], sample.format(bits)).double())
            ax.plot(range(steps + 1), [s.item() for s in path], marker="o", markersize=3, label=label)
        ax.axhline(octav(sample.x, sample.format(bits)).item(), color="black", linewidth=1, label="s*")
        ax.set(title=f"{sample.name}, {bits} bits", xlabel="n", ylabel="s_n")
        ax.legend(fontsize=7)
    return figure


def figure3() -> Figure:
    """Plot the factor that each estimator multiplies a gradient with against x, at s = 1."""
    figure, axes = grid(1, 3)
    for ax, gradient in zip(axes[0], ("ste", "pwl", "mad"), strict=True):
        x = torch.linspace(-3, 3, 601, requires_grad=True)
        fake_quantize(x, 1.0, 4, gradient=gradient).sum().backward()
        assert x.grad is not None
        ax.plot(x.detach(), x.grad, color=CHOSEN)
        ax.set(title=gradient.upper(), xlabel="x", ylabel="dQ/dx", ylim=(-0.05, 1.1))
    return figure
