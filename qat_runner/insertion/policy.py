"""The policy: which tensor gets how many bits, at which granularity (Appendix E.2 of the paper)."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qat_runner.quant import BITS

FULL_PRECISION = 32
"""The bit-width that means "leave this tensor alone"."""

GRADIENT_PAIRS = {"ste": ("ste", "ste"), "pwl": ("pwl", "pwl"), "mad": ("mad", "mad"), "mph": ("mad", "pwl")}
"""Gradient name -> (estimator of weights, estimator of activations); mph is the paper's hybrid."""

GRANULARITIES = ("channel", "tensor")


@dataclass(frozen=True)
class Policy:
    """Bits, granularity, clipping and gradient of every tensor that is quantized.

    Raises:
        ValueError: a field out of range; the message names it and what is allowed.
    """

    weight_bits: int = 4
    """bits of weights, 2 to 16, or 32 for full precision everywhere"""
    activation_bits: int = 4
    """bits of layer inputs, likewise"""
    first_last_bits: int | None = 8
    """bits of weight and input of the first convolution and of the last linear layer, likewise; None: as elsewhere"""
    clipping: Any = "octav"
    """clipping method: a name in CLIPPING_METHODS or in LEARNED, or a function, see `Quantizer`"""
    clipping_options: dict[str, Any] = field(default_factory=dict)
    """options of the clipping method, e.g. {"q": 99.9}"""
    warm_iterations: int | None = 6
    """octav: at most so many reads of a tensor a training step, from the previous step's scalar; None: from cold"""
    dynamic: bool = True
    """solve scalars on each call, or be static, with calibrated ones"""
    gradient: str = "mph"
    """ste, pwl, mad or mph"""
    eval_mode: str = "dynamic"
    """what activation quantizers do in eval(): dynamic, running or last; weights are always solved"""
    conv_granularity: str = "channel"
    """clipping scalars of a convolution weight: one per output channel, or one per tensor; pact has one per tensor"""
    linear_granularity: str = "tensor"
    """clipping scalars of a linear weight: one per output feature (channel), or one per tensor; pact as above"""
    synchronize: bool = False
    """solve activation scalars in training on the batch of all processes together"""
    quantize_head: bool = True
    """whether the last linear layer is quantized"""
    keep: tuple[str, ...] = ()
    """names of layers that are left in full precision"""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits"):
            bits = getattr(self, name)
            if name == "first_last_bits" and bits is None:
                continue
            if isinstance(bits, bool) or not (bits in BITS or bits == FULL_PRECISION):
                raise ValueError(
                    f"{name}={bits!r}: must be {BITS.start} to {BITS.stop - 1}, or {FULL_PRECISION} for full precision"
                )
        if self.gradient not in GRADIENT_PAIRS:
            raise ValueError(f"gradient={self.gradient!r}: must be one of {', '.join(GRADIENT_PAIRS)}")
        for name in ("conv_granularity", "linear_granularity"):
            if getattr(self, name) not in GRANULARITIES:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(GRANULARITIES)}")

    @property
    def full_precision(self) -> bool:
        """Whether nothing at all is quantized."""
        return self.weight_bits == self.activation_bits == FULL_PRECISION

    def bits(self, tensor: str, end: bool) -> int:
        """Bits of an operand of a layer; `end`: it is the first convolution or the last linear layer.

        A tensor kind in full precision is so everywhere, at the ends too.
        """
        bits = self.weight_bits if tensor == "weight" else self.activation_bits
        return self.first_last_bits if end and self.first_last_bits and bits != FULL_PRECISION else bits

    def weight_shape(self, layer: nn.Module) -> tuple[int, ...]:
        """Shape of the clipping scalars of a layer's weight [K, ...]: [K, 1, ...], or [] for one scalar."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        granularity = self.conv_granularity if isinstance(layer, nn.Conv2d) else self.linear_granularity
        return (weight.shape[0], *[1] * (weight.ndim - 1)) if granularity == "channel" else ()
