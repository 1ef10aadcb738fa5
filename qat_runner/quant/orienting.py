"""The sign of s in oriented formats, which places the extra code on the side where it reduces the error more.

An oriented format has levels from -s to s (1 - 2^(1-B)). With s and -s, all levels are the same except the outermost
ones, so the squared errors differ only where |x| is above t = |s| (1 - 2^-B), half-way between |s| and the next level:

    error(s > 0) - error(s < 0) = 2 D sum (x - clip(x, -t, t)),        D = |s| 2^(1-B)

The sum, called the overhang, takes one read of x, and its sign determines the better sign of s exactly. With
s = max |x|, the extra code lies on the side of the largest magnitude.
"""

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.formats import IntFormat
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, extremes

CLEARLY = 0.1
"""A known sign changes only if this reduces the error by more than this fraction of the rounding noise."""


def side_of_largest(x: Tensor, dims: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """Return the sign of s that suits the largest magnitude of each row: -1 if that element is positive, else 1.

    Args:
        x: any shape and floating dtype.
        dims: the dimensions that one scalar spans, kept with size 1.
        pool: the parts, of which x is one, that share scalars; None if x is the whole tensor.

    Returns:
        1 or -1, in the shape of s and the compute dtype.
    """
    low, high = extremes(x, dims, pool)
    return torch.where(high > -low, -1.0, 1.0).to(compute_dtype(x))


def oriented(x: Tensor, s: Tensor, format: IntFormat, before: Tensor | None = None, pool: Pool | None = None) -> Tensor:
    """Return clipping scalars with the sign for which x has the smaller squared error.

    Args:
        x: any shape and floating dtype.
        s: magnitudes of the scalars, [] or one per index of some dimension, broadcastable to x.
        format: an oriented format.
        before: numbers with the current signs, in the shape of s, for a tensor that changes little. A sign changes only
            if the error clearly decreases (`CLEARLY`), so that signs do not flip back and forth. None if there are no
            signs yet.
        pool: the parts, of which x is one, that share scalars; None if x is the whole tensor.

    Returns:
        Scalars in the shape and dtype of s. Zeros have a sign, too. No gradient flows through the result.
    """
    if x.numel() == 0 and pool is None:
        return s if before is None else torch.copysign(s, before)
    step = 1 / format.levels_per_scalar
    return kernels.backend(x).orient(x.detach(), s, before, 1 - step / 2, CLEARLY * step / 24, pool)
