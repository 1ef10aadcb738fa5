"""What OCTAV minimizes, J(s), as far as it depends on the format, and how long a solver may look for its minimum."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qat_runner.quant.formats import Format, IntFormat
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype


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
    What they start from and answer with is s = t / r.
    """

    noise: float
    """k: noise of rounding, in units of t^2"""
    signed: bool
    """whether both signs count"""
    reach: float = 1.0
    """r = t / s"""
    short: Tensor | None = None
    """below zero in rows whose negative side is the one that ends at t; shape of s, compute dtype; None: in no row"""

    @property
    def sided(self) -> bool:
        """Whether there are two sides, which end at different places."""
        return self.signed and self.reach < 1

    @property
    def weight(self) -> float:
        """w."""
        return 1 / self.reach**2


class Search(NamedTuple):
    """Where a solver looks for a minimum, and for how long."""

    dims: tuple[int, ...]
    """the dimensions of x that one scalar spans, at least one; they are kept, with size 1"""
    iterations: int
    """reads of x after the start"""
    tolerance: float
    """reading ends when nothing moves by more than this, relatively, where looking is free"""
    pool: Pool | None = None
    """what x is a part of; None: it is all there is"""


def cost_of(format: Format, missing_code: bool, orientation: Tensor | None) -> Cost:
    """What OCTAV minimizes for a format.

    Args:
        format: what is rounded to.
        missing_code: of two's complement: the last code above zero counts where it lies, not at s.
        orientation: of an oriented format: the signs of s, shape of s, compute dtype; only they count.
    """
    if not isinstance(format, IntFormat) or format.closed or not (missing_code or format.oriented):
        return Cost(format.rounding_noise, format.signed)
    reach = format.highest / format.levels_per_scalar
    return Cost(format.rounding_noise / reach**2, format.signed, reach, orientation)


def sided(x: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Magnitudes a of x and their weights w, in the compute dtype, fresh memory.

    Args:
        x: any shape and floating dtype.
        cost: whose sides are not alike.
    """
    x = x.to(compute_dtype(x))
    towards_short = x if cost.short is None else torch.where(cost.short < 0, -x, x)
    long = towards_short < 0
    return torch.where(long, -cost.reach * towards_short, towards_short), torch.where(long, cost.weight, 1.0)
