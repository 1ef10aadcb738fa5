"""EWGS: Lee et al., "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv 2104.00903.

Equation 7: g_n = g_q (1 + delta sign(g_q) (x_n - x_q)). x_n is the value before rounding, clipped and normalized such
that the clipping interval has length 1, and x_q is the value after rounding. A gradient is increased if its descent
step moves x back towards its level, and decreased if the step moves x further away. Clipped values get no gradient.

The paper recomputes delta of each layer in each epoch from the trace of the Hessian. Here delta is an option, with one
value for all layers that a rule matches; the default 1e-3 is the value that the authors' code uses without Hessians.
Two's complement has no code at +s, so x_n - x_q is up to a whole step there, instead of half a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qat_runner.quant.gradients.estimator import Estimator

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant.formats import Format


@dataclass(frozen=True)
class EWGS(Estimator):
    """Element-wise gradient scaling; see the module docstring."""

    name: ClassVar[str] = "ewgs"

    delta: float = 1e-3
    """scaling factor, 0 or more; with 0, the estimator is the same as pwl"""

    def __post_init__(self) -> None:
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta={self.delta}: must be 0 or more, and finite")

    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        """Return the gradient with respect to x; see `Estimator.backward`."""
        x = x.to(s.dtype)
        low, high = format.clipping_bounds(s)
        length = high - low
        error = (x - format.fake_quantize(x, s)) / length.where(length > 0, 1.0)
        scaled = grad * (error * grad.sign() * self.delta + 1)
        return scaled.where((x >= low) & (x <= high), 0.0).to(grad.dtype)
