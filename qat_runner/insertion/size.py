"""What a network takes to store."""

from collections.abc import Hashable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from qat_runner.insertion.insert import QuantizedTensor, quantized_tensors
from qat_runner.insertion.layers import QuantLayer, owner
from qat_runner.quant import Quantizer

BITS_OF_FLOAT = 32


def size_mb(model: nn.Module) -> tuple[float, float]:
    """Megabytes (10^6 bytes) of a network as it is quantized, and in full precision.

    Quantized weights count at their bits; clipping scalars, biases, BatchNorm and all that is not quantized at 32. What
    several modules share is stored once, for the one that has most bits, and in full precision where it is not
    quantized for one of them.
    """
    owned = {id(t) for m in model.modules() if isinstance(m, Quantizer) for t in (*m.parameters(), *m.buffers())}
    state = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in owned and t.is_floating_point()}
    full = BITS_OF_FLOAT * sum(t.numel() for t in state.values())
    quantized = full + BITS_OF_FLOAT * sum(t.quantizer.s.numel() for t in quantized_tensors(model))
    in_full = _in_full_precision(model)
    for (stored, _), tensors in _by_place(model).items():
        if stored not in in_full:
            bits = max(tensor.quantizer.format.bits for tensor in tensors)
            quantized -= (BITS_OF_FLOAT - bits) * (tensors[0].elements or 0)
    return quantized / 8e6, full / 8e6


def shared_weights(model: nn.Module) -> set[str]:
    """Names of the quantized weights that are stored for other modules as well."""
    in_full = _in_full_precision(model)
    places = _by_place(model).items()
    return {t.name for (stored, _), some in places if len(some) > 1 or stored in in_full for t in some}


def _by_place(model: nn.Module) -> dict[tuple[Hashable, int], list[QuantizedTensor]]:
    """The quantized weights by what they are stored in, and where in it: the projections of attention share one."""
    found: dict[tuple[Hashable, int], list[QuantizedTensor]] = {}
    for tensor in quantized_tensors(model):
        layer = model.get_submodule(tensor.layer)
        if tensor.tensor == "weight" and isinstance(layer, QuantLayer):
            place = id(layer.qat_stored_weight()), layer.qat_stored_part()
            found.setdefault(place, []).append(tensor)
    return found


def _in_full_precision(model: nn.Module) -> set[Hashable]:
    """The parameters that a module has which does not quantize them, whatever it does with them: an embedding, a head
    that is left as it is."""
    quantized = {
        (stored, id(module))
        for (stored, _), tensors in _by_place(model).items()
        for tensor in tensors
        for module in _owners(model.get_submodule(tensor.layer))
    }
    owned = {(id(p), id(module)) for module in model.modules() for p in module._parameters.values() if p is not None}
    return {parameter for parameter, _ in owned - quantized}


def _owners(layer: nn.Module) -> list[nn.Module]:
    """The modules that have what the weight of a layer is made of: itself, or the one whose parameter that is."""
    of = owner(layer)
    return [of, *(of.parametrizations.modules() if is_parametrized(of) else ())]  # type: ignore[union-attr]


def mean_bits(model: nn.Module, weights: bool) -> float | None:
    """Mean bits of the quantized weights of a network, or of its other quantized tensors, over their elements.

    Returns:
        None where there are none, or their elements are not known.
    """
    some = [t for t in quantized_tensors(model) if (t.tensor == "weight") == weights and t.elements]
    total = sum(t.elements or 0 for t in some)
    return sum(t.quantizer.format.bits * (t.elements or 0) for t in some) / total if total else None
