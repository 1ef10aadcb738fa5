"""DoReFa's weights, which PACT quantizes with: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural
Networks with Low Bitwidth Gradients", 2016, arXiv 1606.06160, section 2.3.

    t = tanh(w),   m = max |t| over the whole weight
    q = m (2 quantize_B(t / (2 m) + 1/2) - 1),   quantize_B(v) = round((2^B - 1) v) / (2^B - 1)

The 2^B levels are the odd multiples of m / (2^B - 1): there is no zero. Gradients pass straight through the rounding;
tanh and m are differentiated, as in the authors' own code (tensorpack, examples/DoReFa-Net).

Published, the factor m in front is missing, so that weights fill [-1, 1] whatever they were. There, BatchNorm follows
every layer that is quantized, and such a factor is of no account: the output is the same, and so is the gradient of w
(where the scale of q changes nothing, sum q dL/dq is 0, and this is all that the factor adds to it). It is here for
what that setting does not have: networks that start from trained weights, whose BatchNorm has learned its statistics
at the weights' own scale, and layers without a BatchNorm behind them, such as the last one and all of a
transformer's. Reimplementations that start from trained weights have it as well.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat_runner.quant.clipping import maximum
from qat_runner.quant.estimators import refuse_double_backward
from qat_runner.quant.formats import Format, MidriseFormat
from qat_runner.quant.method import Call, ClippingMethod
from qat_runner.quant.quantizer import Quantizer
from qat_runner.quant.tensors import compute_dtype


@dataclass(frozen=True)
class DoReFa(ClippingMethod):
    """DoReFa's weights, as above."""

    name: ClassVar[str] = "dorefa"

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """m = max tanh |x|."""
        return maximum(x, format, dim, check=call.check).tanh()

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """Of as many bits as the format has; there is one scalar for the whole weight, and no estimator to choose."""
        return DoReFaQuantizer(format.bits)


class DoReFaQuantizer(Quantizer):
    """Quantizes a weight as above; `s` is m, one scalar for the whole weight.

    As a dynamic Quantizer else. Static, after `freeze`, m is a constant.

    Args:
        bits: 2 to 16.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(MidriseFormat(bits), DoReFa(), gradient="ste")

    def clipped(self, x: Tensor) -> Tensor:
        """tanh(x): of a weight that m stems from nothing is clipped."""
        return x.to(compute_dtype(x)).tanh()

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor, format: Format | None = None) -> Tensor:
        """As `Quantizer.quantized`."""
        return _quantized(x, s, format or self.format)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        out: Tensor = _DoReFa.apply(x, s, self.format, self.dynamic)
        return out


def _quantized(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """tanh(x), rounded to the levels; 0 where s is 0."""
    q = format.fake_quantize(x.to(compute_dtype(x)).tanh(), s)
    return q if q.dtype == x.dtype else q.to(x.dtype)


class _DoReFa(torch.autograd.Function):
    """Saves x and s only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, format: Format, of_x: bool) -> Tensor:
        """of_x: s is max tanh |x|, rather than a constant."""
        ctx.save_for_backward(x, s)
        ctx.format, ctx.of_x = format, of_x
        return _quantized(x, s, format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, s = ctx.saved_tensors
        dtype = compute_dtype(x)
        grad, x, s = grads[0].to(dtype), x.to(dtype), s.to(dtype)
        t = x.tanh()
        of_t = grad
        if ctx.of_x and x.numel():
            of_s = (grad * (_quantized(x, s, ctx.format) - t)).sum() / torch.where(s == 0, 1.0, s)
            largest = x.abs() == x.abs().max()  # several share the gradient, as they do in PyTorch's own maximum
            of_t = grad + of_s / largest.sum() * largest * x.sign()
        return (of_t / x.cosh().square()).to(grads[0].dtype), None, None, None  # 1 - t^2, without cancellation
