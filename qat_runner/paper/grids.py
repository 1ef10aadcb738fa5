"""Plot an effect that the paper neglects: where the outermost levels lie, and how much that matters for short rows."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from qat_runner.paper.figures import grid
from qat_runner.quant import Format, IntAffineFormat, IntFormat, Range, fake_quantize, maximum, octav, oriented

BITS = 3
"""Bit-width of the levels in the left plot."""
LENGTHS = (9, 16, 25, 64, 144, 576, 2304)
"""Elements per row: depthwise 3x3 and 5x5 filters, pointwise filters, and 3x3 filters of 16 to 256 channels."""


def ranges() -> Figure:
    """Plot the levels of each range for a row of numbers, and the SQNR of rows by their length at 4 bits."""
    figure, axes = grid(1, 2)
    figure.set_size_inches(11, 4)
    _codes(axes[0][0])
    _lengths(axes[0][1])
    return figure


def _codes(ax: Axes) -> None:
    x = torch.tensor([-1.1, -0.75, -0.4, -0.15, 0.1, 0.3, 0.55, 0.85, 1.6])
    formats: list[Format] = [*(IntFormat(BITS, range=range) for range in Range), IntAffineFormat(BITS)]
    for i, format in enumerate(formats):
        y = float(len(formats) - i)
        s = signed(x, maximum(x, format), format)
        rounded, levels = fake_quantize(x, s, format), fake_quantize(torch.linspace(-2, 2, 4001), s, format).unique()
        colour, name = OF_FORMAT[i], str(getattr(format, "range", "affine"))
        ax.plot(levels, torch.full_like(levels, y), "|", color="black", markersize=16)
        ax.plot(x, torch.full_like(x, y + 0.3), "o", color=colour, markersize=4)
        for value, to in zip(x.tolist(), rounded.tolist(), strict=True):
            ax.plot([value, to], [y + 0.3, y], color=colour, linewidth=0.8)
        scalars = f"s = {s:.2g}" if format.parts == 1 else f"low = {s[0]:.2g}, high = {s[1]:.2g}"
        error = (x - rounded).square().mean().item()
        ax.text(-2.6, y + 0.42, f"{name}: {scalars}, MSE {error:.3f}", fontsize=8)
    ax.set(title=f"{2**BITS} levels, max-scaling", xlabel="x", xlim=(-2.7, 2.1), ylim=(0.6, 4.8), yticks=[])


def _lengths(ax: Axes) -> None:
    generator = torch.Generator().manual_seed(0)
    for range, colour in zip(Range, OF_FORMAT, strict=False):
        format = IntFormat(4, range=range)
        figures: dict[str, list[float]] = {"max": [], "OCTAV": []}
        for n in LENGTHS:
            x = torch.randn(max(200_000 // n, 100), n, generator=generator)
            found = {"max": maximum(x, format, 0), "OCTAV": octav(x, format, 0, missing_code=True)}
            for method, s in found.items():
                noise = (x - fake_quantize(x, signed(x, s, format), format)).square().mean()
                figures[method].append(10 * (x.square().mean() / noise).log10().item())
        for method, style in (("OCTAV", "-"), ("max", "--")):
            ax.plot(LENGTHS, figures[method], style, color=colour, label=f"{range}, {method}")
    ax.set(title="Normal numbers, 4 bits, scalar per row", xlabel="elements per row", ylabel="SQNR (dB)", xscale="log")
    ax.legend(fontsize=7)


def signed(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """Return the scalars, with a sign if the format is oriented."""
    return oriented(x, s, format) if isinstance(format, IntFormat) and format.oriented else s


OF_FORMAT = ("#b3261e", "#1a73e8", "#188038", "#9334e6")
"""Colours of the formats: two's complement, full range, oriented and affine."""
