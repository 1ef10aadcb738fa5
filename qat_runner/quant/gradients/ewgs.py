"""EWGS: Lee et al., "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv 2104.00903.

Equation 7: g_n = g_q (1 + delta sign(g_q) (x_n - x_q)), where x_n is the value before rounding, clipped and normalized
such that the clipping interval has length 1, and x_q the one after: a gradient that would move x away from its level,
and on to the next, is made larger, and one that would take it back smaller. What is clipped gets none.

There delta of each layer is found anew each epoch from the trace of the Hessian. Here it is an option, one number for
all layers that a rule names; 1e-3 is what the authors' code takes without Hessians. There is no code at +s in two's
complement, so that x_n - x_q goes up to a whole step there, instead of half of one.
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
    """Element-wise gradient scaling: see the module's head."""

    name: ClassVar[str] = "ewgs"

    delta: float = 1e-3
    """0 or more; 0 is pwl"""

    def __post_init__(self) -> None:
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta={self.delta}: must be 0 or more, and finite")

    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        """As `Estimator.backward`."""
        x = x.to(s.dtype)
        low, high = format.ends(s)
        length = high - low
        error = (x - format.fake_quantize(x, s)) / length.where(length > 0, 1.0)
        scaled = grad * (error * grad.sign() * self.delta + 1)
        return scaled.where((x >= low) & (x <= high), 0.0).to(grad.dtype)
