"""A clipping method in one file: the scalar is a multiple of the mean magnitude."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qat_runner import calibrate, noise_report, quantize_model


def mean_multiple(
    x: Tensor, bits: int, signed: bool = True, dim: int | None = None, multiple: float = 3.0, *, check: bool = True
) -> Tensor:
    """s = multiple * the mean of the magnitudes that are not zero, of the whole tensor or of each row along dim."""
    if check and not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinity")
    a = x.detach().abs() if signed else x.detach().clamp(min=0)
    if dim is None:
        return multiple * a.sum() / (a != 0).sum().clamp(min=1)
    dims = [d for d in range(x.ndim) if d != dim % x.ndim]
    return multiple * a.sum(dims, keepdim=True) / (a != 0).sum(dims, keepdim=True).clamp(min=1)


def main() -> None:
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    quantize_model(model, bits=4, clipping=mean_multiple, multiple=2.5, dynamic=False, example=digits[:8])
    calibrate(model, digits[:500].split(100))
    print(noise_report(model, [digits[500:600]]))


if __name__ == "__main__":
    main()
