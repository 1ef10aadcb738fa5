"""Use OCTAV's clipping scalars in torchao's post-training quantization at 4 bits, by an additional observer.

Without retraining, the least noise in every tensor does not mean the highest accuracy. This example shows how to pass
the scalars to torchao, not which method is better.

pip install torchao==0.18 && python docs/examples/torchao_observer.py
"""

import copy
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchao.quantization.pt2e.observer import MinMaxObserver, ObserverBase, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

from qat_runner.quant import IntFormat, octav

BITS = 4


class OctavObserver(ObserverBase):
    """Step sizes from OCTAV, averaged over the observed batches, with zero point 0.

    torchao's quantizer passes the dtype, range and scheme of the tensor; signed and bits follow from the range.
    """

    def __init__(self, dtype: torch.dtype, quant_min: int, quant_max: int, **spec: Any) -> None:
        super().__init__(dtype)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.qscheme, self.ch_axis = spec["qscheme"], spec.get("ch_axis")
        self.format = IntFormat((quant_max - quant_min).bit_length(), quant_min < 0)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(octav(x.detach(), self.format, self.ch_axis))
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        s = torch.stack(self.seen).mean(0).reshape(-1)
        scale = (s / self.format.levels_per_scalar).clamp(min=torch.finfo(s.dtype).tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int64)


class PerChannelOctavObserver(OctavObserver):
    """The same per channel: torchao passes the channel axis to an observer only if its name contains PerChannel."""


def config(activations: Any, weights: Any) -> QuantizationConfig:
    """Configure unsigned inputs (images, or the outputs of a ReLU) and signed weights, one step size per channel."""
    low, high = 0, 2**BITS - 1
    of_inputs = QuantizationSpec(torch.uint8, activations, low, high, torch.per_tensor_affine)
    low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
    of_weights = QuantizationSpec(torch.int8, weights, low, high, torch.per_channel_symmetric, ch_axis=0)
    return QuantizationConfig(of_inputs, None, of_weights, None)


def quantized(model: nn.Module, x: Tensor, how: QuantizationConfig) -> nn.Module:
    """Return a copy of the model, quantized by torchao and calibrated on x."""
    exported = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    quantizer = X86InductorQuantizer().set_global(how).set_module_name_qconfig("0", None)  # but not the first layer
    prepared = prepare_pt2e(exported.module(), quantizer)
    for batch in x.split(250):
        prepared(batch)
    return convert_pt2e(prepared)


def main() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(12):
        for rows in torch.randperm(1000).split(50):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ways = {
        "full precision": model,
        "minimum and maximum": quantized(model, x[:1000], config(MinMaxObserver, PerChannelMinMaxObserver)),
        "OCTAV": quantized(model, x[:1000], config(OctavObserver, PerChannelOctavObserver)),
    }
    with torch.no_grad():
        exact = model(x[1000:])
        for name, network in ways.items():
            logits = network(x[1000:])
            correlation = nn.functional.cosine_similarity(logits.flatten(), exact.flatten(), dim=0)
            accuracy = 100 * (logits.argmax(1) == y[1000:]).double().mean()
            print(f"{name:20} {accuracy:.1f} %, cosine of the logits {correlation:.4f}")


if __name__ == "__main__":
    main()
