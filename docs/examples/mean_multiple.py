"""A clipping method in one file: the scalar is a multiple of the mean magnitude."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qat_runner import calibrate, noise_report, quantize_model
from qat_runner.quant import METHODS, Call, ClippingMethod, Format


@dataclass(frozen=True)
class MeanMultiple(ClippingMethod):
    """s = multiple * the mean of the nonzero magnitudes, over the whole tensor or over each row along dim."""

    name: ClassVar[str] = "mean_multiple"

    multiple: float = 3.0
    """above 0"""

    def __post_init__(self) -> None:
        if not self.multiple > 0:
            raise ValueError(f"multiple={self.multiple}: must be above 0")

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """As `ClippingMethod.solve`."""
        if call.check and not bool(torch.isfinite(x).all()):
            raise ValueError("x holds NaN or infinity")
        a = x.detach().abs() if format.signed else x.detach().clamp(min=0)
        if dim is None:
            return self.multiple * a.sum() / (a != 0).sum().clamp(min=1)
        dims = [d for d in range(x.ndim) if d != dim % x.ndim]
        return self.multiple * a.sum(dims, keepdim=True) / (a != 0).sum(dims, keepdim=True).clamp(min=1)


METHODS.register(MeanMultiple.name, MeanMultiple)  # from here on, its name can be used


def main() -> None:
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    quantize_model(model, bits=4, clipping="mean_multiple", multiple=2.5, dynamic=False, example=digits[:8])
    calibrate(model, digits[:500].split(100))
    print(noise_report(model, [digits[500:600]]))


if __name__ == "__main__":
    main()
