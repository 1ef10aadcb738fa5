"""The trust estimator of QuEST: Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations",
2025, arXiv 2502.05003.

The gradient at Q(x) approximates the gradient at x and is trusted where the two points are close: it passes where
|x - Q(x)| <= T, and is 0 elsewhere. T is half a step by default. The gradient then passes for all values that are only
rounded, and for clipped values within half a step of the outermost level. QuEST uses step sizes that are MSE-optimal
for a Gaussian, on tensors that a Hadamard transform has made nearly Gaussian. Here, the clipping method determines the
step size.

For a codebook, whose levels are not evenly spaced, the step is the distance between the two highest levels, as in
QuEST's own code for codebooks.
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
class Trust(Estimator):
    """The trust estimator; see the module docstring."""

    name: ClassVar[str] = "trust"

    factor: float = 1.0
    """T, in units of half a step; above 0"""

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor={self.factor}: must be above 0, and finite")

    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        """Return the gradient with respect to x; see `Estimator.backward`."""
        x = x.to(s.dtype)
        step = (format.reach(s) if format.parts == 1 else s[1] - s[0]) * format.spacing
        rounding = 1 + 2.0 ** (format.bits - 22)  # margin for the rounding error of float32 at the outermost codes
        return grad.where((x - format.fake_quantize(x, s)).abs() <= step * (self.factor / 2 * rounding), 0.0)
