"""A figure of what the paper neglects: where the last codes lie, and what that is worth to rows of few elements."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from qat_runner.paper.figures import grid
from qat_runner.quant import IntFormat, Range, fake_quantize, maximum, octav, orientation

BITS = 3
"""Of the codes that are drawn."""
LENGTHS = (9, 16, 25, 64, 144, 576, 2304)
"""Elements of a row: depthwise 3x3 and 5x5 filters, pointwise ones, and 3x3 ones of 16 to 256 channels."""


def ranges() -> Figure:
    """The codes of each range on a row of numbers, and the SQNR of rows by their length at 4 bits."""
    figure, axes = grid(1, 2)
    figure.set_size_inches(11, 4)
    _codes(axes[0][0])
    _lengths(axes[0][1])
    return figure


def _codes(ax: Axes) -> None:
    x = torch.tensor([-1.1, -0.75, -0.4, -0.15, 0.1, 0.3, 0.55, 0.85, 1.6])
    for i, range in enumerate(Range):
        format = IntFormat(BITS, range=range)
        s = signed(x, maximum(x, format), format)
        y = float(len(Range) - i)
        levels = torch.tensor(format.levels) * s
        rounded = fake_quantize(x, s, format)
        ax.plot(levels, torch.full_like(levels, y), "|", color="black", markersize=16)
        ax.plot(x, torch.full_like(x, y + 0.3), "o", color=OF_RANGE[range], markersize=4)
        for value, to in zip(x.tolist(), rounded.tolist(), strict=True):
            ax.plot([value, to], [y + 0.3, y], color=OF_RANGE[range], linewidth=0.8)
        error = (x - rounded).square().mean().item()
        ax.text(-2.6, y + 0.42, f"{range}: s = {s:.2g}, MSE {error:.3f}", fontsize=8)
    ax.set(title=f"{2**BITS} codes, max-scaling", xlabel="x", xlim=(-2.7, 2.1), ylim=(0.6, 3.8), yticks=[])


def _lengths(ax: Axes) -> None:
    generator = torch.Generator().manual_seed(0)
    for range in Range:
        format = IntFormat(4, range=range)
        figures: dict[str, list[float]] = {"max": [], "OCTAV": []}
        for n in LENGTHS:
            x = torch.randn(max(200_000 // n, 100), n, generator=generator)
            found = {"max": maximum(x, format, 0), "OCTAV": octav(x, format, 0, missing_code=True)}
            for method, s in found.items():
                noise = (x - fake_quantize(x, signed(x, s, format), format)).square().mean()
                figures[method].append(10 * (x.square().mean() / noise).log10().item())
        for method, style in (("OCTAV", "-"), ("max", "--")):
            ax.plot(LENGTHS, figures[method], style, color=OF_RANGE[range], label=f"{range}, {method}")
    ax.set(title="Normal numbers, 4 bits, a scalar a row", xlabel="elements of a row", ylabel="SQNR, dB", xscale="log")
    ax.legend(fontsize=7)


def signed(x: Tensor, s: Tensor, format: IntFormat) -> Tensor:
    """Scalars with their sign, where the format has one."""
    return s * orientation(x, s, format) if format.oriented else s


OF_RANGE = {Range.TWOS_COMPLEMENT: "#b3261e", Range.FULL: "#1a73e8", Range.ORIENTED: "#188038"}
"""Colours."""
