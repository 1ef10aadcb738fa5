"""What a network takes to store."""

from torch import nn

from qat_runner.insertion.insert import quantized_tensors
from qat_runner.quant import Quantizer

BITS_OF_FLOAT = 32


def size_mb(model: nn.Module) -> tuple[float, float]:
    """Megabytes (10^6 bytes) of a network as it is quantized, and in full precision.

    Quantized weights count at their bits; clipping scalars, biases, BatchNorm and all that is not quantized at 32.
    """
    owned = {id(t) for m in model.modules() if isinstance(m, Quantizer) for t in (*m.parameters(), *m.buffers())}
    state = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in owned and t.is_floating_point()}
    full = BITS_OF_FLOAT * sum(t.numel() for t in state.values())
    quantized = full
    for tensor in quantized_tensors(model):
        quantized += BITS_OF_FLOAT * tensor.quantizer.s.numel()
        if tensor.tensor == "weight" and tensor.elements:
            quantized -= (BITS_OF_FLOAT - tensor.quantizer.format.bits) * tensor.elements
    return quantized / 8e6, full / 8e6


def mean_bits(model: nn.Module, weights: bool) -> float | None:
    """Mean bits of the quantized weights of a network, or of its other quantized tensors, over their elements.

    Returns:
        None where there are none, or their elements are not known.
    """
    some = [t for t in quantized_tensors(model) if (t.tensor == "weight") == weights and t.elements]
    total = sum(t.elements or 0 for t in some)
    return sum(t.quantizer.format.bits * (t.elements or 0) for t in some) / total if total else None
