"""The storage size of a network."""

from collections.abc import Hashable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from qat_runner.insertion.insert import QuantizedTensor, quantized_tensors
from qat_runner.insertion.layers import QuantLayer, owner
from qat_runner.quant import Quantizer

BITS_OF_FLOAT = 32


def size_mb(model: nn.Module) -> tuple[float, float]:
    """Return the megabytes (10^6 bytes) that a network takes as it is quantized, and in full precision.

    Quantized weights count with their bit-width; clipping scalars, biases, BatchNorm and everything else that is not
    quantized count with 32 bits. What several modules share is stored once, at the largest of their bit-widths, and in
    full precision if one of them does not quantize it.
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
    """Return the names of the quantized weights whose storage other modules share."""
    in_full = _in_full_precision(model)
    places = _by_place(model).items()
    return {t.name for (stored, _), some in places if len(some) > 1 or stored in in_full for t in some}


def _by_place(model: nn.Module) -> dict[tuple[Hashable, int], list[QuantizedTensor]]:
    """Return the quantized weights by the parameter that stores them and their part of it.

    The projections of `nn.MultiheadAttention` are parts of one parameter.
    """
    found: dict[tuple[Hashable, int], list[QuantizedTensor]] = {}
    for tensor in quantized_tensors(model):
        layer = tensor.module
        if tensor.tensor == "weight" and isinstance(layer, QuantLayer):
            place = id(layer.qat_stored_weight()), layer.qat_stored_part()
            found.setdefault(place, []).append(tensor)
    return found


def _in_full_precision(model: nn.Module) -> set[Hashable]:
    """Return the ids of parameters owned by a module that does not quantize them, however it uses them.

    An embedding and a head that is left as it is are examples.
    """
    quantized = {
        (stored, id(module))
        for (stored, _), tensors in _by_place(model).items()
        for tensor in tensors
        for module in _owners(tensor.module)
    }
    owned = {(id(p), id(module)) for module in model.modules() for p in module._parameters.values() if p is not None}
    return {parameter for parameter, _ in owned - quantized}


def _owners(layer: nn.Module) -> list[nn.Module]:
    """Return the modules that own the parameter of a layer's weight: the layer itself, or the module around it.

    The modules that parametrize it are among them.
    """
    of = owner(layer)
    return [of, *(of.parametrizations.modules() if is_parametrized(of) else ())]  # type: ignore[union-attr]


def mean_bits(model: nn.Module, weights: bool) -> float | None:
    """Return the average bit-width, over elements, of a network's quantized weights or of its other quantized tensors.

    Returns:
        None if there are no such tensors, or if their numbers of elements are not known.
    """
    some = [t for t in quantized_tensors(model) if (t.tensor == "weight") == weights and t.elements]
    total = sum(t.elements or 0 for t in some)
    return sum(t.quantizer.format.bits * (t.elements or 0) for t in some) / total if total else None
