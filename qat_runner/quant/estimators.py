"""Fake quantization x -> Q(x; s), differentiated by a gradient estimator (section 4 of the paper; `gradients`).

Clipping scalars are treated as constants and get no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.formats import Format, IntFormat, as_format
from qat_runner.quant.gradients import Estimator, gradient_estimator
from qat_runner.quant.kernels import operators
from qat_runner.quant.tensors import compute_dtype, derivatives_wanted, recording, transformed

Solve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function x -> (clipping scalars of x, x quantized with them)."""
SolveAll = Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""A function xs -> (clipping scalars of each tensor, each tensor quantized with them)."""


def check_single_backward() -> None:
    """Check that the current backward pass is not differentiated itself. Call it within a backward pass.

    Raises:
        RuntimeError: if a second derivative is requested.
    """
    # Gradient mode is on in a backward pass only under create_graph=True. A compiler rejects double backward itself.
    # torch.func.grad always turns gradient mode on, but it matters only if another transform differentiates the result.
    again = derivatives_wanted() > 1 if transformed() else torch.is_grad_enabled() and not recording()
    if again:
        raise RuntimeError(
            "fake_quantize: double backward (create_graph=True) is not supported, "
            "since the gradient estimators are not derivatives of a function"
        )


class _Estimated(torch.autograd.Function):
    """Saves only x and s: the backward pass recomputes which elements were clipped."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        check_single_backward()
        if ctx.gradient.straight:
            return grad, None, None, None
        x, s = ctx.saved_tensors
        with torch.no_grad():
            return ctx.gradient.backward(grad, x, s, ctx.format), None, None, None


def _refused_jvp(ctx: Any, *tangents: Any) -> Any:
    raise RuntimeError(
        "fake_quantize: forward-mode derivatives (jvp) are not supported, "
        "since the gradient estimators are defined for the backward pass only"
    )


def _save(ctx: Any, x: Tensor, s: Tensor, format: Format, gradient: Estimator) -> None:
    """Save what the backward pass needs."""
    if not gradient.straight:
        ctx.save_for_backward(x, s)
    ctx.format, ctx.gradient = format, gradient


class _Recorded(_Estimated):
    """For compilers, which do not support functions with a jvp."""

    @staticmethod
    def forward(x: Tensor, s: Tensor, format: Format, gradient: Estimator) -> Tensor:
        return kernels.backend(x).fake_quantize(x, s, format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, *inputs)


class _FakeQuantize(_Recorded):
    generate_vmap_rule = True  # from the vmap rules of the operators
    jvp = staticmethod(_refused_jvp)


class _SolveAndQuantize(_Estimated):
    jvp = staticmethod(_refused_jvp)

    @staticmethod
    def forward(ctx: Any, x: Tensor, solve: Solve, format: Format, gradient: Estimator) -> Tensor:
        s, out = solve(x)
        _save(ctx, x, s, format, gradient)
        return out


def solve_and_quantize(x: Tensor, solve: Solve, format: Format, gradient: Estimator) -> Tensor:
    """Fake-quantize x like `fake_quantize`, with one operation that both solves for the scalars and quantizes.

    Args:
        x: any shape, floating dtype.
        solve: a function that returns the clipping scalars of x, and x quantized with them.
        format: the format that `solve` rounds to.
        gradient: the gradient estimator.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return solve(x)[1]
    out: Tensor = _SolveAndQuantize.apply(x, solve, format, gradient)
    return out


class _SolveAndQuantizeAll(torch.autograd.Function):
    """Solves and quantizes several tensors. A tensor whose output receives no gradient gets none."""

    @staticmethod
    def forward(
        ctx: Any, solve: SolveAll, scalars: list[Tensor], format: IntFormat, gradient: Estimator, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        found, outs = solve(xs)
        scalars.extend(found)
        if not gradient.straight:
            ctx.save_for_backward(*xs, *found)
        ctx.format, ctx.gradient = format, gradient
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out, x in zip(outs, xs, strict=True) if not x.requires_grad))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_single_backward()
        there = [i for i, grad in enumerate(grads) if grad is not None]
        passed = list(grads)
        if there and not ctx.gradient.straight:
            saved, some = ctx.saved_tensors, [grad for grad in grads if grad is not None]
            xs, ss = [saved[i] for i in there], [saved[len(grads) + i] for i in there]
            with torch.no_grad():
                found = ctx.gradient.backward_all(some, xs, ss, ctx.format)
            for i, grad in zip(there, found, strict=True):
                passed[i] = grad
        return None, None, None, None, *passed


def solve_and_quantize_all(
    xs: Sequence[Tensor], solve: SolveAll, format: IntFormat, gradient: Estimator
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Apply `solve_and_quantize` to several tensors at once; the backward pass waits for the gradients of all of them.

    Args:
        xs: any shapes, the same floating dtype and device.
        solve: a function that returns the clipping scalars of all tensors, and the tensors quantized with them.
        format: the format that `solve` rounds to.
        gradient: the gradient estimator.

    Returns:
        The scalars and the quantized tensors.
    """
    if not torch.is_grad_enabled():
        return solve(xs)
    ss: list[Tensor] = []
    outs = _SolveAndQuantizeAll.apply(solve, ss, format, gradient, *xs)
    return ss, outs


def fake_quantize(x: Tensor, s: Tensor | float, format: Format | int, gradient: str | Estimator = "mad") -> Tensor:
    """Quantize x with clipping scalar s, and return floating-point values: levels of the format times s.

    Source: the quantizer of section 2 (two's complement, or unsigned), with the gradient estimators of section 4.
    Ties round to even. Half-precision inputs are scaled and rounded in float32.

    Args:
        x: any shape, floating dtype.
        s: clipping scalar(s) >= 0, finite, in units of x; a number, or a tensor that broadcasts to the shape of x ([]
            for one per tensor, [K, 1, 1, 1] for one per output channel). Oriented formats allow negative values. For
            a format with two clipping bounds, both are stacked along a first dimension. Gets no gradient.
        format: number format to round to; a number B, 2 to 16, means signed B-bit integers with codes
            -2^(B-1)..2^(B-1)-1.
        gradient: ste, pwl, mad, ewgs, trust or a registered name; or an estimator, which may have other options.

    Returns:
        A tensor in the shape, dtype and device of x. Zero where s is zero; NaN where x or s is NaN.

    Raises:
        TypeError: if x is not floating-point.
        ValueError: if `gradient` is unknown, the bit-width is out of range, or s requires a gradient or does not
            broadcast to x.
        RuntimeError: in the backward pass, if it runs with create_graph=True.
    """
    estimator = gradient_estimator(gradient)
    if not x.is_floating_point():
        raise TypeError(f"fake_quantize: x must be floating-point, not {x.dtype}")
    s = torch.as_tensor(s, dtype=compute_dtype(x), device=x.device)
    if s.requires_grad:
        raise ValueError("fake_quantize: s must not require a gradient (pass s.detach())")
    format = as_format(format)
    if format.parts > 1 and (s.ndim == 0 or len(s) != format.parts):
        raise ValueError(
            f"fake_quantize: s of shape {list(s.shape)} must have a first dimension of {format.parts} for {format.name}"
        )
    of_one = s.shape if format.parts == 1 else s.shape[1:]
    if len(of_one) > x.ndim or any(n not in (1, m) for n, m in zip(reversed(of_one), reversed(x.shape), strict=False)):
        raise ValueError(f"fake_quantize: s of shape {list(s.shape)} does not broadcast to x of shape {list(x.shape)}")
    recorded = recording() and not transformed()
    if recorded and estimator.in_kernels and operators.serves(format):
        return operators.fake_quantize(x, s, format, estimator.name)
    out: Tensor = (_Recorded if recorded else _FakeQuantize).apply(x, s, format, estimator)
    return out
