"""The reference backend: the three operations that cost time, in plain PyTorch.

Freshly allocated memory costs several times what the arithmetic does (8.4 M floats on two cores: 16 ms for
`x.abs()`, 1 ms for the same in place), so each operation allocates once and then works in place.
"""

import math

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels import newton
from qat_runner.quant.pool import Pool


def recording() -> bool:
    """Whether operations are recorded for later tensors than these: by torch.compile, torch.jit.trace or make_fx."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch.jit.is_tracing()) or get_proxy_mode() is not None  # type: ignore[attr-defined, no-untyped-call]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is reduced and rounded in: float64 for float64, else float32 (fp16, bf16, float32)."""
    return torch.promote_types(x.dtype, torch.float32)


def magnitudes(x: Tensor, signed: bool) -> Tensor:
    """What is clipped: |x| on a signed grid, max(x, 0) on an unsigned one; always fresh memory, in `compute_dtype`."""
    a = x.abs() if signed else x.clamp(min=0)
    return a.to(compute_dtype(x))


def kept(x: Tensor, dims: tuple[int, ...]) -> list[int]:
    """The shape of x with size 1 in dims: that of its clipping scalars."""
    return [1 if d in dims else n for d, n in enumerate(x.shape)]


def largest(x: Tensor, signed: bool, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude of each row, dimensions kept, in the compute dtype; 0 for an empty row.

    The extremes of x are read where they lie: |x| would be a copy.
    """
    if not dims:  # each element is a row of its own, and amax(()) would reduce over everything
        return magnitudes(x, signed)
    if math.prod([x.shape[d] for d in dims]) == 0:
        return x.new_zeros(kept(x, dims), dtype=compute_dtype(x))
    top = x.amax(dims, keepdim=True)
    top = torch.maximum(top, -x.amin(dims, keepdim=True)) if signed else top.clamp(min=0)
    return top.to(compute_dtype(x))


def octav(
    x: Tensor,
    k: float,
    signed: bool,
    dims: tuple[int, ...],
    guess: Tensor | None,
    iterations: int,
    tolerance: float,
    pool: Pool | None = None,
) -> Tensor:
    """Solve for the clipping scalars of x (Theorem 3.1).

    Args:
        x: any shape and floating dtype, with elements.
        k: noise of rounding, in units of s^2.
        signed: which magnitudes.
        dims: the dimensions that one scalar spans, at least one; they are kept, with size 1.
        guess: s_1, in units of x, in the result's shape and dtype; None begins with sum |x| / #{x != 0}.
        iterations: reads of x after the start.
        tolerance: reading ends when no scalar moves by more than this, relatively, where looking is free.
        pool: what x is a part of; None: it is all there is.

    Returns:
        s in units of x, in `compute_dtype`.
    """
    a = magnitudes(x, signed)
    cold = guess is None
    top_of_x = largest(x, signed, dims) if pool is None else pool.largest(largest(x, signed, dims))
    guess = top_of_x if guess is None else guess
    nonzero = torch.count_nonzero(a, dims).reshape(guess.shape)  # before small ones can vanish
    unit = newton.begin(guess, k)[newton.UNIT]
    a.div_(unit)
    total, top = a.sum(dims, keepdim=True), a.amax(dims, keepdim=True)
    if pool is not None:
        (total, nonzero), top = pool.total(total, nonzero), top_of_x.double() / unit
    buffer = torch.empty_like(a)

    def step(state: Tensor) -> Tensor:
        torch.sub(a, state[newton.S].to(a.dtype), out=buffer).relu_()
        excess = buffer.sum(dims, keepdim=True)
        outside = buffer.sign_().sum(dims, keepdim=True)
        if pool is not None:
            excess, outside = pool.total(excess, outside)
        return newton.advance(state, excess, outside, total, nonzero, top)

    look = x.device.type == "cpu" and not recording()
    return newton.solve(step, guess, k, cold=cold, iterations=iterations, tolerance=tolerance, look=look)


def in_steps(x: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """x / D, which is what is rounded to a code; always fresh memory, in `compute_dtype`.

    Works on x over the full scale, whose grid is a power of two: exact scaling, and no step size that underflows.

    Args:
        x: any shape and floating dtype.
        s: >= 0, broadcastable to x. Where s is 0 it is taken for 1.
        grid: whose step counts.
    """
    dtype = compute_dtype(x)
    full_scale = grid.full_scale(s.to(dtype))
    divisor = torch.where(full_scale == 0, torch.ones_like(full_scale), full_scale)
    return (x.to(dtype) / divisor).mul_(grid.resolution)


def fake_quantize(x: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """Round x to the grid of clipping scalar s.

    Args:
        x: any shape and floating dtype.
        s: >= 0, broadcastable to x. Where s is 0 the result is 0; where it is NaN the result is NaN.
        grid: which.

    Returns:
        code * D, shape and dtype of x.
    """
    q = in_steps(x, s, grid).round_().clamp_(grid.lowest, grid.highest)
    return q.mul_(1.0 / grid.resolution).mul_(grid.full_scale(s.to(q.dtype))).to(x.dtype)


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
