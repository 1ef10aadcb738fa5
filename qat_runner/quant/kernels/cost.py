"""The objective J(s) that OCTAV minimizes, as far as it depends on the format, and the settings of the search."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qat_runner.quant.formats import Format, IntFormat
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype


@dataclass(frozen=True)
class Cost:
    """J as a function of t, the outermost level on the side that reaches less far.

    Where both sides reach equally far, or there is only one side, magnitudes are a = |x| or max(x, 0), and

        J(t) = k t^2 #{0<a<=t} + sum (a - t)^2 1{a>t}

    Otherwise the other side ends at t / r with r < 1. Elements on that side have the magnitude a = r |x|, so that they,
    too, are clipped above a = t, and their squared error (|x| - t/r)^2 = (a - t)^2 / r^2 has the weight w = 1 / r^2:

        J(t) = k t^2 #{0<a<=t} + sum w (a - t)^2 1{a>t}

    Solvers sum the weights w instead of counting elements, on both sides of the equation J' = 0, and divide k by the
    mean weight to compensate. This is exact where both sides are clipped equally often, and nearly exact elsewhere,
    because few elements are clipped. Solvers start from, and return, s = t / r.
    """

    noise: float
    """k: rounding noise, in units of t^2"""
    signed: bool
    """whether both signs count"""
    reach: float = 1.0
    """r = t / s"""
    short: Tensor | None = None
    """negative in the rows whose negative side ends at t; shape of s, compute dtype; None: in no row"""

    @property
    def sided(self) -> bool:
        """Whether there are two sides that end at different distances from zero."""
        return self.signed and self.reach < 1

    @property
    def weight(self) -> float:
        """The weight w = 1 / r^2 of the longer side."""
        return 1 / self.reach**2


class Search(NamedTuple):
    """The settings of a solver: what it reduces over, and when it stops."""

    dims: tuple[int, ...]
    """the dimensions of x that share one scalar, at least one; they are kept, with size 1"""
    iterations: int
    """the largest number of reads of x after the start"""
    tolerance: float
    """reading ends when no scalar moves by more than this, relatively, where checking this is free"""
    pool: Pool | None = None
    """the pool that x is a part of; None: x is the whole"""


def cost_of(format: Format, missing_code: bool, orientation: Tensor | None) -> Cost:
    """Return the objective that OCTAV minimizes for a format.

    Args:
        format: the format that x is rounded to.
        missing_code: for two's complement: take the largest code where it lies, not at s.
        orientation: for an oriented format: numbers with the signs of s, whose magnitudes are ignored; shape of s,
            compute dtype.
    """
    if not isinstance(format, IntFormat) or format.has_code_at_s or not (missing_code or format.oriented):
        return Cost(format.rounding_noise, format.signed)
    reach = format.highest / format.levels_per_scalar
    return Cost(format.rounding_noise / reach**2, format.signed, reach, orientation)


def sided(x: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Return the magnitudes a of x and their weights w, in the compute dtype and fresh memory.

    Args:
        x: any shape and floating dtype.
        cost: a cost with two different sides (`Cost.sided`).
    """
    x = x.to(compute_dtype(x))
    towards_short = x if cost.short is None else torch.where(cost.short < 0, -x, x)
    long = towards_short < 0
    return torch.where(long, -cost.reach * towards_short, towards_short), torch.where(long, cost.weight, 1.0)
