"""Independent reference computations in float64, without regard to speed."""

import math

import torch
from torch import Tensor


def octav_by_sorting(row: Tensor, k: float) -> float:
    """Return the sign change of g(s) = k s #{0<|x|<=s} - sum (|x| - s)+, by a search of all intervals between elements.

    Between two neighbours in sorted order, g is a straight line. Its root is the solution if it lies in the interval.
    If no interval contains its root, g jumps across zero at an element.
    """
    a = sorted(abs(float(v)) for v in row.double() if float(v) != 0)
    n = len(a)
    if n == 0:
        return 0.0
    tail = math.fsum(a)
    for inside in range(n):  # s in [left, a[inside]): `inside` elements are <= s
        left = a[inside - 1] if inside else 0.0
        root = tail / (k * inside + (n - inside))
        if root < left:  # g was negative before `left` and is positive after it
            return left
        if root < a[inside]:
            return root
        tail -= a[inside]
    return a[-1]


def j_on_grid(x: Tensor, bits: int, signed: bool, candidates: Tensor) -> Tensor:
    """Return J(s) of section 2, term by term, for candidates [n] in shape [n], float64."""
    a = x.double().abs().flatten()
    k = 4.0**-bits / (3 if signed else 12)
    return torch.stack([(k * s**2 * ((a > 0) & (a <= s)) + (a - s) ** 2 * (a > s)).mean() for s in candidates.double()])


def textbook_octav(x: Tensor, bits: int, signed: bool, iterations: int) -> Tensor:
    """Iterate Corollary 3.2 as printed, in float64."""
    a = x.double().abs()
    s = a.sum() / (a != 0).sum()
    for _ in range(iterations):
        clipped = a > s
        s = (a * clipped).sum() / (4.0**-bits / (3 if signed else 12) * ((a > 0) & ~clipped).sum() + clipped.sum())
    return s


def quantize_by_hand(x: Tensor, s: float, bits: int, signed: bool) -> Tensor:
    """Quantize by the table of section 2, in float64."""
    step = s * 2.0 ** (1 - bits) if signed else s * 2.0**-bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return torch.round(x.double() / step).clamp(low, high) * step


def straight_through(v: Tensor) -> Tensor:
    """Return round(v), with the gradient of v."""
    return v + (v.round() - v).detach()


def interval_cost(x: Tensor, ends: Tensor, noise: float, dims: tuple[int, ...]) -> Tensor:
    """Return J of `clipping_intervals.octav`, float64."""
    x, (low, high) = x.double(), ends.double()
    clipped = torch.minimum(torch.maximum(x, low), high)
    inside = ((x == clipped) & (x != 0)).sum(dims, keepdim=True)
    return noise * (high - low).square() * inside + (x - clipped).square().sum(dims, keepdim=True)


def same_but_for_ties(found: Tensor, expected: Tensor, share: float = 0.1) -> None:
    """Check that the outputs of two networks, [N, K], are equal except for values that are rounded near ties.

    Their difference must be much smaller than the differences among inputs. Other codes near ties stay below this
    limit; a wrong layer does not.

    Args:
        found, expected: outputs for the same inputs.
        share: allowed difference, as a fraction of the largest difference among inputs.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() < share * (expected - expected.mean(0)).abs().max()
