"""A gradient estimator with an option."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qat_runner.quant import Estimator, Format


@dataclass(frozen=True)
class Leaky(Estimator):
    """The derivative is 1 within the clipping bounds, and less outside."""

    name: ClassVar[str] = "leaky"

    leak: float = 0.1
    """the factor outside, 0 to 1"""

    def __post_init__(self) -> None:
        if not 0 <= self.leak <= 1:
            raise ValueError(f"leak={self.leak}: must be 0 to 1")

    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        low, high = format.clipping_bounds(s)
        return grad.where((x >= low) & (x <= high), grad * self.leak)
