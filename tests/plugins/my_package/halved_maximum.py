"""A clipping method with an option."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qat_runner.quant import Call, ClippingMethod, Format, maximum


@dataclass(frozen=True)
class HalvedMaximum(ClippingMethod):
    """The clipping scalar is a share of the largest magnitude."""

    name: ClassVar[str] = "halved_maximum"

    share: float = 0.5
    """above 0, at most 1"""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: must be above 0 and at most 1")

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        return maximum(x, format, dim, check=call.check) * self.share
