"""The reference backend: the three operations that cost time, in plain PyTorch.

Freshly allocated memory costs several times what the arithmetic does (8.4 M floats on two cores: 16 ms for
`x.abs()`, 1 ms for the same in place), so each operation allocates once and then works in place.
"""

import torch
from torch import Tensor

from qat_runner.quant.formats import Format
from qat_runner.quant.kernels import newton
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, largest, magnitudes, recording


def octav(
    x: Tensor,
    format: Format,
    dims: tuple[int, ...],
    guess: Tensor | None,
    iterations: int,
    tolerance: float,
    pool: Pool | None = None,
) -> Tensor:
    """Solve for the clipping scalars of x (Theorem 3.1).

    Args:
        x: any shape and floating dtype, with elements.
        format: whose magnitudes and noise of rounding count.
        dims: the dimensions that one scalar spans, at least one; they are kept, with size 1.
        guess: s_1, in units of x, in the result's shape and dtype; None begins with sum |x| / #{x != 0}.
        iterations: reads of x after the start.
        tolerance: reading ends when no scalar moves by more than this, relatively, where looking is free.
        pool: what x is a part of; None: it is all there is.

    Returns:
        s in units of x, in `compute_dtype`.
    """
    k, signed = format.rounding_noise, format.signed
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


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """Round x to the levels of a format: `Format.fake_quantize`."""
    return format.fake_quantize(x, s)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """The gradient of fake_quantize with respect to x, by the estimators of section 4.

    Args:
        grad: gradient of the loss with respect to the output, shape and dtype of x.
        x: the input of fake_quantize.
        s: its clipping scalar, broadcastable to x.
        format: the clipping interval is [-s, s] where it is signed, [0, s] otherwise.
        gradient: "ste" (1 everywhere), "pwl" (1 inside, 0 outside), "mad" (1 inside, clip(x) / x outside).

    Returns:
        Shape and dtype of `grad`.
    """
    if gradient == "ste":
        return grad
    dtype = compute_dtype(x)
    s = s.to(dtype)
    x = x.to(dtype)
    clipped = torch.clamp(x, -s if format.signed else torch.zeros_like(s), s)
    if gradient == "pwl":
        return grad * (clipped == x)
    # MAD (Prop. 4.3): clip(x) = alpha * x with alpha held constant; alpha is 1 inside, where 0 / 0 must not appear.
    alpha = clipped.div_(x).masked_fill_(x == 0, 1.0)
    return alpha.mul_(grad).to(grad.dtype)
