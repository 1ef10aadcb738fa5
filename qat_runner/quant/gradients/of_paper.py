"""The estimators of section 4 of the paper, whose backward passes are in the kernels.

The interval is [-s, s] for a signed format; for an unsigned one it is [0, s], so what an unsigned one clips at zero
counts as outside, with clip(x) / x = 0 as the magnitude ratio of mad. With two ends it is [low, high]. MPH, the paper's
hybrid, is not an estimator of its own: mad for weights and pwl for activations.
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
        """As `Estimator.backward`."""
        from qat_runner.quant import kernels

        return kernels.backend(x).fake_quantize_backward(grad, x, s, format, self.name)

    def backward_all(
        self, grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat
    ) -> list[Tensor]:
        """As `Estimator.backward_all`, in a call or two."""
        from qat_runner.quant import kernels

        return kernels.backend(xs[0]).fake_quantize_backward_all(grads, xs, ss, format, self.name)


@dataclass(frozen=True)
class STE(_InKernels):
    """Straight-through: 1 everywhere."""

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
