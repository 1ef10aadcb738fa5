"""A learned clipping method, which starts from the largest magnitude and is trained with PACT's gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qat_runner.quant import Call, Format, LearnedMethod, maximum


@dataclass(frozen=True)
class LearnedMaximum(LearnedMethod):
    """The learned parameter is the clipping scalar itself."""

    name: ClassVar[str] = "learned_maximum"

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        return maximum(x, format, dim, check=call.check)

    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        x = x.to(s.dtype)
        above, below = x >= s, x <= (-s if format.signed else torch.zeros_like(s))
        return grad.masked_fill(above | below, 0), grad.to(s.dtype) * (
            above.to(s.dtype) - (below & format.signed).to(s.dtype)
        )
