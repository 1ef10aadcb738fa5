"""Which way an oriented scale points: the sign of s, which puts the code at the end where it serves.

An oriented format has levels from -s to s (1 - 2^(1-B)). Between both signs of s all levels but the ends are the same,
so the squared error differs only where x lies beyond t = |s| (1 - 2^-B), half-way between the two last levels:

    error(s > 0) - error(s < 0) = 2 D sum (x - clip(x, -t, t)),        D = |s| 2^(1-B)

The sum, the overhang, is one read of x, and its sign is the answer, exactly. With s = max |x| it is the side of the
largest magnitude that is served.
"""

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.formats import IntFormat
from qat_runner.quant.pool import Pool
from qat_runner.quant.tensors import compute_dtype, extremes

CLEARLY = 0.1
"""A scale that points one way already turns only for a gain of more than this share of the noise of rounding."""


def side_of_largest(x: Tensor, dims: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """The sign of s that serves the largest magnitude of each row: -1 where it is positive, 1 elsewhere.

    Args:
        x: any shape and floating dtype.
        dims: what one scalar spans, kept with size 1.
        pool: what x is a part of.

    Returns:
        1 or -1, shape of s, compute dtype.
    """
    low, high = extremes(x, dims, pool)
    return torch.where(high > -low, -1.0, 1.0).to(compute_dtype(x))


def oriented(x: Tensor, s: Tensor, format: IntFormat, before: Tensor | None = None, pool: Pool | None = None) -> Tensor:
    """Clipping scalars with the sign under which x has the smaller squared error.

    Args:
        x: any shape and floating dtype.
        s: their magnitudes, [] or one an index of some dimension, broadcastable to x.
        format: oriented.
        before: numbers with the sign until now, shape of s, for a tensor that changes little: it stays unless turning
            clearly pays, so that it does not flicker. None: there was none.
        pool: what x is a part of; None: it is all there is.

    Returns:
        Shape and dtype of s; zeros have a sign as well. No gradient flows through it.
    """
    if x.numel() == 0 and pool is None:
        return s if before is None else torch.copysign(s, before)
    step = 1 / format.levels_per_scalar
    return kernels.backend(x).orient(x.detach(), s, before, 1 - step / 2, CLEARLY * step / 24, pool)
