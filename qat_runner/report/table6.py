"""Table 6: seconds to find the clipping scalars of BERT-Base's tensors, by OCTAV and by the MSE sweep."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from tabulate import tabulate
from torch import Tensor

from qat_runner.quant import mse_sweep, octav

LAYERS, HIDDEN, INNER, HEADS, BATCH, LENGTH, BATCHES = 12, 768, 3072, 12, 4, 384, 10
"""BERT-Base on SQuAD as the paper fine-tunes it; activations are calibrated on 10 batches."""

HEADERS = ("bits", "weights: OCTAV, s", "MSE sweep, s", "activations: OCTAV, s", "MSE sweep, s", "sweep / OCTAV")


def weights() -> list[tuple[tuple[int, ...], int]]:
    """Shape and number of the 74 weight tensors: query, key, value and output, the two of the inner layer, the ends."""
    return [
        ((HIDDEN, HIDDEN), 4 * LAYERS + 1),
        ((INNER, HIDDEN), LAYERS),
        ((HIDDEN, INNER), LAYERS),
        ((2, HIDDEN), 1),
    ]


def activations() -> list[tuple[tuple[int, ...], int]]:
    """Shape and number of the 1220 activation tensors: inputs of those layers and operands of attention's products."""
    operand = (BATCH, HEADS, LENGTH, LENGTH)
    return [
        ((BATCH, LENGTH, HIDDEN), (5 + 3) * LAYERS * BATCHES + 2 * BATCHES),
        ((BATCH, LENGTH, INNER), LAYERS * BATCHES),
        (operand, LAYERS * BATCHES),
    ]


def measure(bits: int, repeats: int = 3) -> tuple[float, float, float, float]:
    """Seconds for weights by OCTAV and by the sweep, then for activations.

    Each shape is timed by itself, on normally distributed values, as the median of `repeats`, and counted as often as
    it occurs: 1220 tensors of the same few shapes take as long as one of each shape, so many times.

    Args:
        bits: of the grid.
        repeats: timings of each shape.
    """
    methods: list[Callable[..., Tensor]] = [octav, mse_sweep]
    return (
        *[_seconds(weights(), method, bits, 0, repeats) for method in methods],  # type: ignore[return-value]
        *[_seconds(activations(), method, bits, None, repeats) for method in methods],
    )


def _seconds(
    shapes: list[tuple[tuple[int, ...], int]], method: Callable[..., Tensor], bits: int, dim: int | None, repeats: int
) -> float:
    total = 0.0
    for shape, count in shapes:
        x = torch.randn(shape)
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            method(x, bits, True, dim, check=False)
            times.append(time.perf_counter() - began)
        total += count * statistics.median(times)
    return total


def rows(all_bits: tuple[int, ...] = (4, 5, 6, 7, 8), repeats: int = 3) -> Iterator[tuple[str, ...]]:
    """The table's rows, as they are measured."""
    for bits in all_bits:
        w_octav, w_sweep, a_octav, a_sweep = measure(bits, repeats)
        ratio = (w_sweep + a_sweep) / (w_octav + a_octav)
        yield str(bits), f"{w_octav:.3f}", f"{w_sweep:.2f}", f"{a_octav:.2f}", f"{a_sweep:.1f}", f"{ratio:.0f}"


def text(content: list[tuple[str, ...]]) -> str:
    """Markdown."""
    table = tabulate(content, HEADERS, tablefmt="github", disable_numparse=True)
    return (
        f"## table6: seconds to calibrate BERT-Base's 74 weight and 1220 activation tensors\n\n{table}\n\n"
        f"On {torch.get_num_threads()} CPU threads, OCTAV compiled, the sweep in plain PyTorch; synthetic tensors of "
        f"BERT-Base's shapes. "
        f"Published: OCTAV is about 10 times faster than the sweep.\n"
    )
