"""Weight quantization of DoReFa, which PACT uses for weights: Zhou et al., "DoReFa-Net: Training Low Bitwidth
Convolutional Neural Networks with Low Bitwidth Gradients", 2016, arXiv 1606.06160, section 2.3.

    t = tanh(w),   m = max |t| over the whole weight
    q = m (2 quantize_B(t / (2 m) + 1/2) - 1),   quantize_B(v) = round((2^B - 1) v) / (2^B - 1)

The 2^B levels are the odd multiples of m / (2^B - 1), so there is no zero. Gradients pass straight through the
rounding; tanh and m are differentiated, as in the authors' own code (tensorpack, examples/DoReFa-Net).

The paper does not have the factor m in front, so its quantized weights always fill [-1, 1]. There, BatchNorm follows
every quantized layer, and such a factor has no effect: the output is the same, and so is the gradient of w (if the
scale of q does not change the loss, then sum q dL/dq is 0, which is all that the factor adds to the gradient). The
factor is needed here for two cases that do not occur in the paper: networks that start from trained weights, whose
BatchNorm has learned its statistics at the scale of the original weights, and layers that are not followed by
BatchNorm, such as the last one and all layers of a transformer. Other implementations that start from trained weights
have this factor as well.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat_runner.quant.clipping import maximum
from qat_runner.quant.estimators import check_single_backward
from qat_runner.quant.formats import Format, MidriseFormat
from qat_runner.quant.method import Call, ClippingMethod
from qat_runner.quant.quantizer import Quantizer
from qat_runner.quant.tensors import compute_dtype


@dataclass(frozen=True)
class DoReFa(ClippingMethod):
    """Weight quantization of DoReFa; see the module docstring."""

    name: ClassVar[str] = "dorefa"

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return m = max tanh |x|."""
        return maximum(x, format, dim, check=call.check).tanh()

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """Return a quantizer with the bit-width of `format` and one scalar for the weight; the estimator is fixed."""
        return DoReFaQuantizer(format.bits)


class DoReFaQuantizer(Quantizer):
    """Quantizes a weight as the module docstring describes; `s` is m, one scalar for the whole weight.

    Otherwise it behaves like a dynamic `Quantizer`. After `freeze` it is static, and m is a constant.

    Args:
        bits: bit-width, 2 to 16.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(MidriseFormat(bits), DoReFa(), gradient="ste")

    def clipped(self, x: Tensor) -> Tensor:
        """Return tanh(x), which is compared with m: nothing is clipped if m was computed from the same weight."""
        return x.to(compute_dtype(x)).tanh()

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor, format: Format | None = None) -> Tensor:
        """Return x quantized with s, without a gradient; see `Quantizer.quantized`."""
        return _quantized(x, s, format or self.format)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        out: Tensor = _DoReFa.apply(x, s, self.format, self.dynamic)
        return out


def _quantized(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """Return tanh(x), rounded to the levels; 0 where s is 0."""
    q = format.fake_quantize(x.to(compute_dtype(x)).tanh(), s)
    return q if q.dtype == x.dtype else q.to(x.dtype)


class _DoReFa(torch.autograd.Function):
    """Saves only x and s for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, format: Format, of_x: bool) -> Tensor:
        """Quantize x; `of_x` means that s is max tanh |x|, not a constant."""
        ctx.save_for_backward(x, s)
        ctx.format, ctx.of_x = format, of_x
        return _quantized(x, s, format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_single_backward()
        x, s = ctx.saved_tensors
        dtype = compute_dtype(x)
        grad, x, s = grads[0].to(dtype), x.to(dtype), s.to(dtype)
        t = x.tanh()
        of_t = grad
        if ctx.of_x and x.numel():
            of_s = (grad * (_quantized(x, s, ctx.format) - t)).sum() / torch.where(s == 0, 1.0, s)
            largest = x.abs() == x.abs().max()  # ties share the gradient, as in PyTorch's own maximum
            of_t = grad + of_s / largest.sum() * largest * x.sign()
        return (of_t / x.cosh().square()).to(grads[0].dtype), None, None, None  # 1 - t^2, without cancellation
