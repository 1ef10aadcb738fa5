"""The backend where operations are recorded (`tensors.recording`): PyTorch operators, and eager for the rest.

No result may alias an argument: some versions of PyTorch differentiate through such an alias and bypass our backward
pass.
"""

from torch import Tensor

from qat_runner.quant.formats import Format
from qat_runner.quant.kernels import eager, operators
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.eager import (
    CALLS_COST,
    fake_quantize_backward_all,
    learned_backward,
    octav_and_quantize,
    octav_and_quantize_all,
    orient,
    refine,
)
from qat_runner.quant.kernels.remembered import remember

__all__ = [
    "CALLS_COST",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_backward_all",
    "learned_backward",
    "octav",
    "octav_and_quantize",
    "octav_and_quantize_all",
    "octav_interval",
    "orient",
    "refine",
    "remember",
]


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav`."""
    return operators.octav(x, cost, guess, search) if search.pool is None else eager.octav(x, cost, guess, search)


def octav_interval(x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav_interval`."""
    if search.pool is not None:
        return eager.octav_interval(x, noise, guess, search)
    return operators.octav_interval(x, noise, guess, search)


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`."""
    return operators.fake_quantize(x, s, format) if operators.serves(format) else format.fake_quantize(x, s)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`."""
    if not operators.serves(format):
        return eager.fake_quantize_backward(grad, x, s, format, gradient)
    return operators.fake_quantize_backward(grad, x, s, format, gradient)
