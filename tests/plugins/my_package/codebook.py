"""A number format in one file: 2^B levels at the quantiles of a normal distribution, as in QLoRA's NF4 (2023)."""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from qat_runner.quant import Format
from qat_runner.quant.tensors import compute_dtype


@dataclass(frozen=True)
class Codebook(Format):
    """A format whose levels are dense near zero, where most values of a trained tensor lie.

    Zero and both ends are among the levels. If unsigned, they are quantiles of half a normal distribution.
    """

    @property
    def levels(self) -> tuple[float, ...]:
        return _levels(self.bits, self.signed)

    @property
    def rounding_noise(self) -> float:
        """For values of the distribution whose quantiles the levels are: equally many in each gap, spread evenly."""
        gaps = [b - a for a, b in zip(self.levels, self.levels[1:], strict=False)]
        return sum(gap**2 for gap in gaps) / 12 / len(gaps)

    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        levels = torch.tensor(self.levels, dtype=dtype, device=x.device)
        s = s.to(dtype)
        v = x.to(dtype) / torch.where(s == 0, torch.ones_like(s), s)
        codes = torch.bucketize(v.contiguous(), (levels[1:] + levels[:-1]) / 2).to(dtype)
        return torch.where(v.isnan(), v, codes)

    def decode(self, codes: Tensor, s: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, dtype=codes.dtype, device=codes.device)
        return torch.where(codes.isnan(), codes, levels[codes.nan_to_num().long()]) * s.to(codes.dtype)


@cache
def _levels(bits: int, signed: bool) -> tuple[float, ...]:
    count = 2**bits
    normal, tail = NormalDist(), 1 / (2 * count)
    if not signed:
        raw = [normal.inv_cdf(0.5 + (0.5 - tail) * i / (count - 1)) for i in range(count)]
    else:  # zero counts once, so there is one level fewer on the left
        left, right = count // 2 - 1, count // 2
        raw = [-normal.inv_cdf(0.5 + (0.5 - tail) * i / left) for i in range(left, 0, -1)]
        raw += [normal.inv_cdf(0.5 + (0.5 - tail) * i / right) for i in range(right + 1)]
    top = max(map(abs, raw))
    return tuple(value / top for value in raw)
