"""What OCTAV minimizes, J(s), as far as it depends on the format: how coarse rounding is, and where the ends lie."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat_runner.quant.formats import Format, IntFormat


@dataclass(frozen=True)
class Cost:
    """J as a function of t, the last level on the side that reaches less far, in units of which all is counted.

    Where both sides reach equally far, or there is one alone, magnitudes are a = |x| or max(x, 0), and

        J(t) = k t^2 #{0<a<=t} + sum (a - t)^2 1{a>t}

    Otherwise the other side ends at t / r, r < 1. What lies there has the magnitude a = r |x|, so that it is clipped
    from a = t on as well, and its squared error (|x| - t/r)^2 = (a - t)^2 / r^2 has a weight w = 1 / r^2:

        J(t) = k t^2 #{0<a<=t} + sum w (a - t)^2 1{a>t}

    Solvers sum w instead of counting elements, on both sides of the equation J' = 0, and have k take the mean weight
    back: exact where both sides are clipped equally often, and next to nothing off elsewhere, since few are clipped.
    """

    noise: float
    """k: noise of rounding, in units of t^2"""
    signed: bool
    """whether both signs count"""
    reach: float = 1.0
    """r = t / s"""
    short: Tensor | None = None
    """the sign of the side that ends at t, 1 or -1, shape of s, compute dtype; None: both sides are alike"""

    @property
    def weight(self) -> float:
        """w."""
        return 1 / self.reach**2


def cost_of(format: Format, like: Tensor, missing_code: bool, orientation: Tensor | None) -> Cost:
    """What OCTAV minimizes for a format.

    Args:
        format: what is rounded to.
        like: shape, dtype and device of s.
        missing_code: of two's complement: the last code above zero counts where it lies, not at s.
        orientation: of an oriented format: the signs of s, shape of s.
    """
    if not isinstance(format, IntFormat) or format.closed or not (missing_code or format.oriented):
        return Cost(format.rounding_noise, format.signed)
    reach = format.highest / format.levels_per_scalar
    noise = format.rounding_noise / reach**2
    if not format.signed:
        return Cost(noise, False, reach)
    short = torch.ones_like(like) if orientation is None else orientation.to(like.dtype).expand(like.shape)
    return Cost(noise, True, reach, short)


def sided(x: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Magnitudes a of x and their weights w, in the dtype of `cost.short`, fresh memory.

    Args:
        x: any shape and floating dtype.
        cost: with a short side.
    """
    assert cost.short is not None
    towards_short = x.to(cost.short.dtype) * cost.short
    long = towards_short < 0
    return torch.where(long, -cost.reach * towards_short, towards_short), torch.where(long, cost.weight, 1.0)
