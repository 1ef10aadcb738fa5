"""What a network takes to store."""

from collections.abc import Hashable

from torch import nn

from qat_runner.insertion.insert import QuantizedTensor, quantized_tensors
from qat_runner.insertion.layers import QuantLayer, is_quantized
from qat_runner.quant import Quantizer

BITS_OF_FLOAT = 32


def size_mb(model: nn.Module) -> tuple[float, float]:
    """Megabytes (10^6 bytes) of a network as it is quantized, and in full precision.

    Quantized weights count at their bits; clipping scalars, biases, BatchNorm and all that is not quantized at 32. What
    several layers share is stored once, for the one that has most bits, and in full precision where an embedding that
    is not quantized looks it up.
    """
    owned = {id(t) for m in model.modules() if isinstance(m, Quantizer) for t in (*m.parameters(), *m.buffers())}
    state = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in owned and t.is_floating_point()}
    full = BITS_OF_FLOAT * sum(t.numel() for t in state.values())
    quantized = full + BITS_OF_FLOAT * sum(t.quantizer.s.numel() for t in quantized_tensors(model))
    looked_up = _looked_up(model)
    for (stored, _), tensors in _by_place(model).items():
        if stored not in looked_up:
            bits = max(tensor.quantizer.format.bits for tensor in tensors)
            quantized -= (BITS_OF_FLOAT - bits) * (tensors[0].elements or 0)
    return quantized / 8e6, full / 8e6


def shared_weights(model: nn.Module) -> set[str]:
    """Names of the quantized weights that are stored for other layers as well."""
    looked_up = _looked_up(model)
    places = _by_place(model).items()
    return {t.name for (stored, _), some in places if len(some) > 1 or stored in looked_up for t in some}


def _by_place(model: nn.Module) -> dict[tuple[Hashable, int], list[QuantizedTensor]]:
    """The quantized weights by what they are stored in, and where in it: the projections of attention share one."""
    found: dict[tuple[Hashable, int], list[QuantizedTensor]] = {}
    for tensor in quantized_tensors(model):
        layer = model.get_submodule(tensor.layer)
        if tensor.tensor == "weight" and isinstance(layer, QuantLayer):
            place = id(layer.stored_weight()), layer.stored_part()
            found.setdefault(place, []).append(tensor)
    return found


def _looked_up(model: nn.Module) -> set[Hashable]:
    """What embeddings have that are not quantized."""
    plain = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and not is_quantized(m))
    return {id(module.weight) for module in plain}


def mean_bits(model: nn.Module, weights: bool) -> float | None:
    """Mean bits of the quantized weights of a network, or of its other quantized tensors, over their elements.

    Returns:
        None where there are none, or their elements are not known.
    """
    some = [t for t in quantized_tensors(model) if (t.tensor == "weight") == weights and t.elements]
    total = sum(t.elements or 0 for t in some)
    return sum(t.quantizer.format.bits * (t.elements or 0) for t in some) / total if total else None
