"""The estimators of section 4 of the paper, whose backward passes are implemented in the kernels.

The clipping interval is [-s, s] for a signed format and [0, s] for an unsigned one. Negative values thus lie outside
the interval of an unsigned format, and the magnitude ratio of mad is clip(x) / x = 0 there. For a format with two
clipping bounds, the interval is [low, high]. MPH, the hybrid of the paper, is not a separate estimator: it is mad for
weights and pwl for activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qat_runner.quant.gradients.estimator import Estimator

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant.formats import Format, IntFormat


class _InKernels(Estimator):
    in_kernels = True

    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        """Return the gradient with respect to x; see `Estimator.backward`."""
        from qat_runner.quant import kernels

        return kernels.backend(x).fake_quantize_backward(grad, x, s, format, self.name)

    def backward_all(
        self, grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat
    ) -> list[Tensor]:
        """Return the gradients of several tensors, computed in one or two calls; see `Estimator.backward_all`."""
        from qat_runner.quant import kernels

        return kernels.backend(xs[0]).fake_quantize_backward_all(grads, xs, ss, format, self.name)


@dataclass(frozen=True)
class STE(_InKernels):
    """Straight-through estimator: 1 everywhere."""

    name: ClassVar[str] = "ste"
    straight: ClassVar[bool] = True


@dataclass(frozen=True)
class PWL(_InKernels):
    """Piecewise linear: 1 inside the clipping interval, 0 outside."""

    name: ClassVar[str] = "pwl"


@dataclass(frozen=True)
class MAD(_InKernels):
    """Magnitude-aware differentiation (Prop. 4.3): 1 inside the clipping interval, clip(x) / x outside."""

    name: ClassVar[str] = "mad"
