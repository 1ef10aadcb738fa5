"""The reference backend: the three operations that cost time, in plain PyTorch.

Freshly allocated memory costs several times what the arithmetic does (8.4 M floats on two cores: 16 ms for
`x.abs()`, 1 ms for the same in place), so each operation allocates once and then works in place.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat_runner.quant.grid import Grid


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is reduced and rounded in: float64 for float64, else float32 (fp16, bf16, float32)."""
    return torch.promote_types(x.dtype, torch.float32)


def magnitudes(x: Tensor, signed: bool) -> Tensor:
    """What is clipped: |x| on a signed grid, max(x, 0) on an unsigned one; always fresh memory, in `compute_dtype`."""
    a = x.abs() if signed else x.clamp(min=0)
    return a.to(compute_dtype(x))


def reader(x: Tensor, unit: Tensor, signed: bool, dims: tuple[int, ...]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Prepare the reads of x that OCTAV needs: one Newton step (Corollary 3.2) is one read plus scalars.

    Args:
        x: any shape and floating dtype.
        unit: > 0, broadcastable to x with size 1 in `dims`: magnitudes are divided by it, so that no sum overflows.
        signed: which magnitudes.
        dims: the dimensions to sum over, at least one; they are kept, with size 1.

    Returns:
        read(s), with s in units of `unit` and of its shape: for a = magnitudes / unit
        (sum of (a - s) over a > s, number of a > s, sum of a, number of a > 0, largest a), in `compute_dtype` and the
        shape of `unit`.
    """
    a = magnitudes(x, signed)
    nonzero = torch.count_nonzero(a, dims).reshape(unit.shape).to(a.dtype)  # before small ones can vanish
    a.div_(unit)
    total, largest = a.sum(dims, keepdim=True), a.amax(dims, keepdim=True)
    buffer = torch.empty_like(a)

    def read(s: Tensor) -> tuple[Tensor, ...]:
        torch.sub(a, s, out=buffer).relu_()
        excess = buffer.sum(dims, keepdim=True)
        outside = buffer.sign_().sum(dims, keepdim=True)
        return excess, outside, total, nonzero, largest

    return read


def fake_quantize(x: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """Round x to the grid of clipping scalar s.

    Works on x / s, whose grid is a power of two: exact scaling, and no step size that underflows.

    Args:
        x: any shape and floating dtype.
        s: >= 0, broadcastable to x. Where s is 0 the result is 0; where it is NaN the result is NaN.

    Returns:
        code * s / levels, shape and dtype of x.
    """
    dtype = compute_dtype(x)
    s = s.to(dtype)
    divisor = torch.where(s == 0, torch.ones_like(s), s)
    q = x.to(dtype) / divisor
    q.mul_(grid.levels_per_scalar).round_().clamp_(grid.lowest, grid.highest)
    return q.mul_(1.0 / grid.levels_per_scalar).mul_(s).to(x.dtype)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor:
    """The gradient of fake_quantize with respect to x, by the estimators of section 4.

    Args:
        grad: gradient of the loss with respect to the output, shape and dtype of x.
        x: the input of fake_quantize.
        s: its clipping scalar, broadcastable to x.
        signed: the clipping interval is [-s, s] if true, [0, s] otherwise.
        gradient: "ste" (1 everywhere), "pwl" (1 inside, 0 outside), "mad" (1 inside, clip(x) / x outside).

    Returns:
        Shape and dtype of `grad`.
    """
    if gradient == "ste":
        return grad
    dtype = compute_dtype(x)
    s = s.to(dtype)
    x = x.to(dtype)
    clipped = torch.clamp(x, -s if signed else torch.zeros_like(s), s)
    if gradient == "pwl":
        return grad * (clipped == x)
    # MAD (Prop. 4.3): clip(x) = alpha * x with alpha held constant; alpha is 1 inside, where 0 / 0 must not appear.
    alpha = clipped.div_(x).masked_fill_(x == 0, 1.0)
    return alpha.mul_(grad).to(grad.dtype)
