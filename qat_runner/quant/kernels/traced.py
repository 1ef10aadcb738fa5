"""What a torch.compile of the user's own traces instead of a backend's kernels: it fuses them itself.

No operation works in place and no result is an alias: some versions of PyTorch differentiate through these, past the
backward pass that is ours.
"""

import torch
from torch import Tensor

from qat_runner.quant.formats import Format, IntFormat
from qat_runner.quant.kernels.eager import octav, octav_and_quantize, octav_interval, orient, refine, remember
from qat_runner.quant.tensors import compute_dtype

__all__ = [
    "fake_quantize",
    "fake_quantize_backward",
    "octav",
    "octav_and_quantize",
    "octav_interval",
    "orient",
    "refine",
    "remember",
]


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """As `eager.fake_quantize`."""
    if not isinstance(format, IntFormat):
        return format.fake_quantize(x, s)
    s = format.full_scale(s.to(compute_dtype(x)))
    q = x.to(s.dtype) / torch.where(s == 0, 1.0, s) * format.resolution
    q = q.round().clamp(format.lowest, format.highest) * (1.0 / format.resolution) * s
    return q if q.dtype == x.dtype else q.to(x.dtype)  # .to() of the same dtype would be an alias


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`."""
    if gradient == "ste":
        return grad
    s = s.to(compute_dtype(x))
    x = x.to(s.dtype)
    low, high = format.ends(s)
    if gradient == "pwl":
        return torch.where((x <= high) & (x >= low), grad, 0.0)
    clipped = torch.minimum(torch.maximum(x, low), high)
    return (torch.where(x == 0, 1.0, clipped / x) * grad).to(grad.dtype)
