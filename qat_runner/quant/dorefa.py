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

from typing import Any

import torch
from torch import Tensor

from qat_runner.quant.clipping import maximum
from qat_runner.quant.grid import BITS, Grid
from qat_runner.quant.kernels.eager import compute_dtype
from qat_runner.quant.quantizer import Quantizer


@torch.no_grad()
def squashed_maximum(
    x: Tensor, bits: int, signed: bool = True, dim: int | None = None, *, check: bool = True
) -> Tensor:
    """max tanh |x|; as `clipping.maximum` else."""
    return maximum(x, bits, signed, dim, check=check).tanh()


class DoReFaQuantizer(Quantizer):
    """Quantizes a weight as above; `s` is m, one scalar for the whole weight.

    As a dynamic Quantizer else. Static, after `freeze`, m is a constant.

    Args:
        bits: 2 to 16.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits, True, (), squashed_maximum, "ste")
        self.clipping_name = "dorefa"

    @property
    def format(self) -> Grid:
        """The grid whose odd codes are the levels: a bit more than there are bits of information.

        Raises:
            ValueError: there are 16 bits, the most that a code can have.
        """
        if self.bits == BITS[-1]:
            raise ValueError(
                f"DoReFa's weights of {self.bits} bits have codes of {self.bits + 1}, and there are none so wide"
            )
        return Grid(self.bits + 1, closed=True)

    @property
    def levels(self) -> list[float]:
        """All values that there are, in units of s, rising."""
        count = 2**self.bits
        return [(2 * level + 1 - count) / (count - 1) for level in range(count)]

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor) -> Tensor:
        """x, any shape and floating dtype, as a scalar s quantizes it; without a gradient."""
        return _quantized(x, s, self.bits)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        out: Tensor = _DoReFa.apply(x, s, self.bits, self.dynamic)
        return out


def _quantized(x: Tensor, s: Tensor, bits: int) -> Tensor:
    """In the compute dtype, as an odd code times a step size; 0 where s is 0."""
    dtype, highest = compute_dtype(x), 2**bits - 1
    s = s.to(dtype)
    v = x.to(dtype).tanh() / torch.where(s == 0, 1.0, s)
    level = ((v + 1) * (highest / 2)).round().clamp(0, highest)
    q: Tensor = (2 * level - highest) * (s / highest)
    return q if q.dtype == x.dtype else q.to(x.dtype)


class _DoReFa(torch.autograd.Function):
    """Saves x and s only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, bits: int, of_x: bool) -> Tensor:
        """of_x: s is max tanh |x|, rather than a constant."""
        ctx.save_for_backward(x, s)
        ctx.bits, ctx.of_x = bits, of_x
        return _quantized(x, s, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s = ctx.saved_tensors
        dtype = compute_dtype(x)
        grad, x, s = grads[0].to(dtype), x.to(dtype), s.to(dtype)
        t = x.tanh()
        of_t = grad
        if ctx.of_x and x.numel():
            of_s = (grad * (_quantized(x, s, ctx.bits) - t)).sum() / torch.where(s == 0, 1.0, s)
            largest = x.abs() == x.abs().max()  # several share the gradient, as they do in PyTorch's own maximum
            of_t = grad + of_s / largest.sum() * largest * x.sign()
        return (of_t / x.cosh().square()).to(grads[0].dtype), None, None, None  # 1 - t^2, without cancellation
