"""The reference backend: the time-critical operations in plain PyTorch.

Freshly allocated memory costs several times as much as the arithmetic (8.4 M floats on two cores: 16 ms for `x.abs()`,
1 ms for the same in place), so each operation allocates once and then works in place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels import intervals, newton
from qat_runner.quant.kernels.cost import Cost, Search, sided
from qat_runner.quant.kernels.remembered import Remembered, remember
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, extremes, largest, magnitudes, recording, scalar_shape

CALLS_COST = False
"""Whether keeping quantized weights for the backward pass is better than recomputing each by another call."""


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """Solve for the clipping scalars of x (Theorem 3.1).

    Args:
        x: any shape and floating dtype; not empty, unless other parts of its pool have elements.
        cost: the objective.
        guess: s_1, in units of x, in the result's shape and dtype; None: start at sum |x| / #{x != 0}.
        search: dimensions and stopping criteria, see `Search`.

    Returns:
        s in units of x, in `compute_dtype`; NaN for a row with NaN or infinity.
    """
    dims, pool = search.dims, search.pool
    a, weights = sided(x, cost) if cost.sided else (magnitudes(x, cost.signed), None)
    cold = guess is None
    top_of_x = largest(a, False, dims) if cost.sided else largest(x, cost.signed, dims)
    top_of_x = top_of_x if pool is None else pool.largest(top_of_x)
    guess = top_of_x if guess is None else guess * cost.reach
    nonzero = torch.count_nonzero(a, dims).reshape(guess.shape)  # before dividing can underflow
    k: float | Tensor = cost.noise
    if weights is not None:
        weighed = (weights * (a > 0)).sum(dims, keepdim=True)
        if pool is not None:
            nonzero, weighed = pool.total(nonzero, weighed)
        k, nonzero = cost.noise * torch.where(weighed > 0, nonzero / weighed.clamp(min=1), 1.0), weighed
    unit = newton.begin(guess, k)[newton.UNIT]
    a.div_(unit)
    total, top = _sum(a, weights, dims), largest(a, False, dims)
    if pool is not None:
        figures = (total, nonzero) if weights is None else (total,)
        total, nonzero = (*pool.total(*figures), nonzero)[:2]
        top = top_of_x.double() / unit
    buffer = torch.empty_like(a)

    def step(state: Tensor) -> Tensor:
        torch.sub(a, state[newton.S].to(a.dtype), out=buffer).relu_()
        excess = _sum(buffer, weights, dims)
        outside = _sum(buffer.sign_(), weights, dims)
        if pool is not None:
            excess, outside = pool.total(excess, outside)
        return newton.advance(state, excess, outside, total, nonzero, top)

    look = x.device.type == "cpu" and not recording()
    t = newton.solve(step, guess, k, cold=cold, iterations=search.iterations, tolerance=search.tolerance, look=look)
    return torch.where(torch.isfinite(total), t / cost.reach, torch.nan)


def _sum(t: Tensor, weights: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    return (t if weights is None else t * weights).sum(dims, keepdim=True)


def octav_interval(x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor:
    """Solve for the clipping intervals of x (`intervals`).

    Args:
        x: any shape and floating dtype, not empty.
        noise: k, the rounding noise, in units of the interval's width squared.
        guess: the interval to start from, in the form of the result; None: start each bound at twice the mean of the
            elements on its side of zero.
        search: dimensions and stopping criteria, see `Search`; the tolerance is relative to the interval's width.

    Returns:
        The lower and the upper clipping bound in units of x, stacked: [2, *shape of a bound], in `compute_dtype`; NaN
        for a row with NaN or infinity.
    """
    dims, pool = search.dims, search.pool
    low, high = extremes(x, dims, pool)
    reach = torch.maximum(-low, high)
    unit = newton.power_of_two(torch.where(reach > 0, reach, 1.0))
    a = x.to(reach.dtype) / unit
    counts = [torch.count_nonzero(a, dims).reshape(reach.shape).double()]
    if guess is None:
        counts += [(a > 0).sum(dims, keepdim=True), (a < 0).sum(dims, keepdim=True)]
        counts += [a.clamp(min=0).sum(dims, keepdim=True), -a.clamp(max=0).sum(dims, keepdim=True)]
    if pool is not None:
        counts = pool.total(*counts)
    if guess is None:
        u, v = (2 * total / number.clamp(min=1) for number, total in zip(counts[1:3], counts[3:], strict=True))
    else:
        u, v = guess[1] / unit, -guess[0] / unit
    state = intervals.begin(u, v, high / unit, -low / unit, noise, counts[0])
    buffer = torch.empty_like(a)

    def beyond(end: Tensor, sign: int) -> list[Tensor]:
        torch.sub(sign * a, end.to(a.dtype), out=buffer).relu_()
        sums = [buffer.sum(dims, keepdim=True), buffer.square().sum(dims, keepdim=True)]
        return [sums[0], buffer.sign_().sum(dims, keepdim=True), sums[1]]

    look = x.device.type == "cpu" and not recording()
    for _ in range(search.iterations):
        sums = [*beyond(state[intervals.U], 1), *beyond(state[intervals.V], -1)]
        sums = sums if pool is None else pool.total(*sums)
        state = intervals.advance(state, noise, torch.stack(sums[:3]), torch.stack(sums[3:]))
        if look and bool((state[intervals.MOVED] <= search.tolerance).all()):
            break
    u, v = intervals.answer(state, noise)
    return torch.where(torch.isfinite(reach), torch.stack([-v, u]) * unit, torch.nan).to(reach.dtype)


def orient(
    x: Tensor, s: Tensor, before: Tensor | None, halfway: float, clearly: float, pool: Pool | None = None
) -> Tensor:
    """Give clipping scalars the sign that follows from the overhang of x, sum x - clip(x, -t, t) at t = halfway * s.

    Args:
        x: any shape and floating dtype, not empty.
        s: >= 0, broadcastable to x: [], or one for each index of one dimension, with size 1 in the others.
        before: numbers whose signs are kept unless the overhang to the other side is large, shape of s; None: there are
            no previous signs.
        halfway: see above.
        clearly: the overhang per element, in units of s, above which the overhang is large.
        pool: the pool that x is a part of; None: x is the whole.

    Returns:
        s with signs: negative where x overhangs above zero. A scalar of zero gets a sign, too.
    """
    a, t = x.to(s.dtype), s * halfway
    overhang = (a - torch.minimum(torch.maximum(a, -t), t)).sum_to_size(s.shape)
    large = s * (clearly * (x.numel() / s.numel()))
    if pool is not None:
        overhang, large = (figure.to(s.dtype) for figure in pool.total(overhang, large))
    if before is None:
        return torch.where(overhang > 0, -s, s)
    turns = torch.where(before < 0, -overhang, overhang) > large
    return torch.copysign(s, torch.where(turns, -before, before))


def refine(x: Tensor, s: Tensor, format: IntFormat, factors: Sequence[float]) -> Tensor:
    """Return the clipping scalar with the least measured squared error, starting from several candidates.

    The codes c of x at a candidate have their own best step size, sum x c / sum c^2, which leaves the error
    sum x^2 - (sum x c)^2 / sum c^2. So each read of x covers all step sizes that round x to these codes.

    Args:
        x: any shape and floating dtype.
        s: not 0 where x is not 0; in an oriented format it has a sign, which positive factors keep. Broadcastable to x.
        format: the format that x is rounded to.
        factors: the candidates, in units of s.

    Returns:
        Shape of s; s itself where all codes of all candidates are 0.
    """
    x = x.to(s.dtype)
    best, most = s, torch.zeros_like(s)
    for factor in factors:
        codes = format.encode(x, s * factor)
        along, squares = ((x * codes).sum_to_size(s.shape), codes.square().sum_to_size(s.shape))
        step = along / torch.where(squares > 0, squares, 1.0)
        gain = along * step
        best = torch.where(gain > most, step * format.levels_per_scalar, best)
        most = torch.maximum(gain, most)
    return best


def octav_and_quantize(
    x: Tensor, cost: Cost, format: IntFormat, search: Search, state: Remembered, warm: bool
) -> tuple[Tensor, Tensor]:
    """Do a training step of a dynamic quantizer: solve for the scalars of x, remember them, and round x with them.

    Args:
        x: any shape and floating dtype, not empty.
        cost: the objective, for a format that is not oriented.
        format: the format that x is rounded to.
        search: dimensions and stopping criteria, see `Search`; without a pool.
        state: updated in place.
        warm: start from the scalars of `state`, if it has any.

    Returns:
        s in fresh memory, shape and dtype of `state.s` (float64 for float64), and x rounded, shape and dtype of x.
    """
    guess = state.s.to(compute_dtype(x)).expand(scalar_shape(x, search.dims)) if warm and state.known else None
    s = octav(x, cost, guess, search).reshape(state.s.shape)
    remember(s, state)
    return s, fake_quantize(x, s, format)


def octav_and_quantize_all(
    xs: Sequence[Tensor],
    cost: Cost,
    format: IntFormat,
    searches: Sequence[Search],
    states: Sequence[Remembered],
    warm: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Do `octav_and_quantize` for several tensors, such as all weights of a network.

    Args:
        xs: at least one tensor; all on the same device.
        cost: the objective, the same for all tensors.
        format: the format, the same for all tensors.
        searches: one for each tensor; they differ only in their dimensions.
        states: one for each tensor; their fields that are not tensors are equal.
        warm: start from the scalars of the states, if they have any.

    Returns:
        The scalars and the rounded tensors.
    """
    return one_by_one(octav_and_quantize, xs, cost, format, searches, states, warm)


def one_by_one(
    step: Callable[..., tuple[Tensor, Tensor]],
    xs: Sequence[Tensor],
    cost: Cost,
    format: IntFormat,
    searches: Sequence[Search],
    states: Sequence[Remembered],
    warm: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Do `octav_and_quantize_all` by calling a backend's `octav_and_quantize` for each tensor in turn."""
    found = [step(x, cost, format, search, state, warm) for x, search, state in zip(xs, searches, states, strict=True)]
    return [s for s, _ in found], [out for _, out in found]


def fake_quantize(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """Round x to the levels of a format, by `Format.fake_quantize`."""
    return format.fake_quantize(x, s)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """Return the gradient of fake_quantize with respect to x, by the estimators of section 4.

    Args:
        grad: gradient of the loss with respect to the output, shape and dtype of x.
        x: the input of fake_quantize.
        s: its clipping scalar, broadcastable to x, of either sign in an oriented format; or its two clipping bounds,
            stacked.
        format: determines the clipping interval: [-|s|, |s|] if signed, [0, s] if unsigned, or the two bounds.
        gradient: "ste" (1 everywhere), "pwl" (1 inside, 0 outside), "mad" (1 inside, clip(x) / x outside).

    Returns:
        Shape and dtype of `grad`.
    """
    if gradient == "ste":
        return grad
    dtype = compute_dtype(x)
    s = s.to(dtype)
    x = x.to(dtype)
    clipped = torch.clamp(x, *format.clipping_bounds(s))
    if gradient == "pwl":
        return grad * (clipped == x)
    # MAD (Prop. 4.3): clip(x) = alpha * x with alpha held constant. Inside, alpha is 1; set it to avoid 0 / 0 at 0.
    alpha = clipped.div_(x).masked_fill_(x == 0, 1.0)
    return alpha.mul_(grad).to(grad.dtype)


def fake_quantize_backward_all(
    grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat, gradient: str
) -> list[Tensor]:
    """Return `fake_quantize_backward` for each of several tensors."""
    return [fake_quantize_backward(*part, format, gradient) for part in zip(grads, xs, ss, strict=True)]


def learned_backward(
    grad: Tensor, x: Tensor, s: Tensor, format: IntFormat | IntAffineFormat, rounding: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of fake_quantize for a learned grid: for x, and for the learned parameters.

    Args:
        grad: gradient of the loss with respect to the output, shape and dtype of x.
        x: the input of fake_quantize.
        s: its clipping scalar, broadcastable to x, of either sign in an oriented format; or its two clipping bounds,
            stacked.
        format: the format that x was rounded to.
        rounding: if true, the rounding error, code - x / D, counts inside the clipping interval, and the learned
            parameter is the step size D, which has the sign of s (equation 3 of LSQ); with two clipping bounds, D and
            the lower bound are learned (equations 4 and 5 of LSQ+). If false, rounding is passed straight through, and
            the learned parameter is the clipping scalar of plain integers (equation 3 of PACT); in a signed format,
            elements clipped at -s count as well.

    Returns:
        The gradient for x, shape and dtype of `grad`, 0 where x is clipped; and the gradient for the learned
        parameters, summed over the elements, shape of s, in the compute dtype.
    """
    s = s.to(compute_dtype(x))
    x, wide = x.to(s.dtype), grad.to(s.dtype)
    if isinstance(format, IntAffineFormat):
        clipped, shares = _shares_of_ends(x, s, format)
    elif rounding:
        clipped, shares = _shares_of_step(x, s, format)
    else:
        above, below = x >= s, x <= (-s if format.signed else torch.zeros_like(s))
        clipped, shares = above | below, [above.to(s.dtype) - (below & format.signed).to(s.dtype)]
    sums = [(wide * share).sum_to_size(s.shape[format.parts > 1 :]) for share in shares]
    return grad.masked_fill(clipped, 0), sums[0] if format.parts == 1 else torch.stack(sums)


def _shares_of_step(x: Tensor, s: Tensor, format: IntFormat) -> tuple[Tensor, list[Tensor]]:
    """Return which elements are clipped, and the derivative of the output with respect to the step size."""
    v = format.in_steps(x, s)
    inside = (v > format.lowest) & (v < format.highest)
    return ~inside, [v.round().clamp(format.lowest, format.highest) - torch.where(inside, v, 0.0)]


def _shares_of_ends(x: Tensor, s: Tensor, format: IntAffineFormat) -> tuple[Tensor, list[Tensor]]:
    """Return the same for two clipping bounds, with the derivatives for the step size and the lower bound."""
    step, zero = format.step(s), format.zero_point(s)
    v = x / torch.where(step == 0, 1.0, step)
    below, above = v <= -zero, v >= format.highest - zero
    clipped = below | above
    # Below the interval, the output is the lower bound; above it, the lower bound plus `highest` steps; inside, a whole
    # number of steps, which does not depend on the lower bound.
    of_step = torch.where(clipped, torch.where(above, float(format.highest), 0.0), v.round() - v)
    return clipped, [of_step, (clipped & format.signed).to(v.dtype)]
