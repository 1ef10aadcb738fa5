"""Rotations of both factors of a linear layer, which leave their product unchanged.

A Hadamard transform spreads single large elements over a whole block and makes tensors nearly Gaussian, so that fewer
bits suffice: QuaRot (Ashkboos et al. 2024), and for training QuEST (Panferov et al. 2025). It is its own inverse and
its own transpose: (x H) (w H)^T = x w^T.
"""

import math

import torch
from torch import Tensor, nn

from qat_runner.quant.tensors import compute_dtype

LARGEST = 128
"""Maximum number of elements of a block, as in QuEST."""


def block_of(features: int) -> int:
    """Return the largest power of two that divides a number of features, but at most LARGEST."""
    return math.gcd(features, LARGEST)


class Hadamard(nn.Module):
    """The orthonormal Hadamard transform of blocks of the last dimension, in Sylvester's order.

    Args:
        block: number of elements of a block, a power of two that divides the dimension.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., C], floating-point; same shape and dtype, computed in at least float32."""
        y = x.to(compute_dtype(x)).unflatten(-1, (-1, self.block))
        for half in (2**i for i in range(self.block.bit_length() - 1)):
            a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
            y = torch.stack([a + b, a - b], -2).flatten(-3)
        rotated: Tensor = (y.flatten(-2) / math.sqrt(self.block)).to(x.dtype)
        return rotated

    def extra_repr(self) -> str:
        return f"block={self.block}"
