"""Independent ways to the same numbers, in float64 and as slow as they like."""

import math

import torch
from torch import Tensor


def octav_by_sorting(row: Tensor, k: float) -> float:
    """The sign change of g(s) = k s #{0<|x|<=s} - sum (|x| - s)+, found by looking at every interval between elements.

    Between two neighbours in sorted order g is a straight line; its root counts where it falls into the interval. Where
    no interval holds its root, g jumps across zero at an element.
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
    """J(s) of section 2, term by term, for each candidate [n] -> [n], float64."""
    a = x.double().abs().flatten()
    k = 4.0**-bits / (3 if signed else 12)
    return torch.stack([(k * s**2 * ((a > 0) & (a <= s)) + (a - s) ** 2 * (a > s)).mean() for s in candidates.double()])


def textbook_octav(x: Tensor, bits: int, signed: bool, iterations: int) -> Tensor:
    """Corollary 3.2 as printed, in float64."""
    a = x.double().abs()
    s = a.sum() / (a != 0).sum()
    for _ in range(iterations):
        clipped = a > s
        s = (a * clipped).sum() / (4.0**-bits / (3 if signed else 12) * ((a > 0) & ~clipped).sum() + clipped.sum())
    return s


def quantize_by_hand(x: Tensor, s: float, bits: int, signed: bool) -> Tensor:
    """The table of section 2 in float64."""
    step = s * 2.0 ** (1 - bits) if signed else s * 2.0**-bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return torch.round(x.double() / step).clamp(low, high) * step


def straight_through(v: Tensor) -> Tensor:
    """round(v), with the gradient of v."""
    return v + (v.round() - v).detach()


def interval_cost(x: Tensor, ends: Tensor, noise: float, dims: tuple[int, ...]) -> Tensor:
    """J of `two_ends.octav`, float64."""
    x, (low, high) = x.double(), ends.double()
    clipped = torch.minimum(torch.maximum(x, low), high)
    inside = ((x == clipped) & (x != 0)).sum(dims, keepdim=True)
    return noise * (high - low).square() * inside + (x - clipped).square().sum(dims, keepdim=True)


def same_but_for_ties(found: Tensor, expected: Tensor, share: float = 0.1) -> None:
    """Of a network's outputs, [N, K]: they differ by far less than they do among inputs, as much as codes beside a tie
    may make of it, and a layer that is wrong may not.

    Args:
        found, expected: of the same inputs.
        share: of the largest difference among inputs.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() < share * (expected - expected.mean(0)).abs().max()
