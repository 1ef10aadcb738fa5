"""Insert quantizers into a model, list them, and remove them again.

`insert` works in these steps:

1. Look at the example, if there is one, to see what the forward of each module multiplies (`observing.observe`).
2. Convert layers, attention modules and modules that multiply by own parameters in place, without quantizers yet.
3. Run the example through the converted model (`trace`). Raise an error if it does not compute what it did before.
4. Give each operand the quantizer that the policy specifies. Undo the conversion where nothing is quantized.
5. Set the signs of the inputs as the trace found them. Without an example, the first forward pass does that.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.errors import one_line
from qat_runner.insertion.attention import (
    EAGER,
    attention_as,
    attention_of,
    modules_served,
    quantize_attention,
    restore_attention,
)
from qat_runner.insertion.layers import (
    ELEMENTS,
    UNSWAPPABLE,
    QuantLayer,
    QuantLinear,
    Swapped,
    convert,
    each,
    elements_of,
    full_precision_class,
    full_precision_name,
    give_quantizers,
    has_own_forward,
    is_plain,
    is_quantized,
    kind_of,
    layer_kind,
    modules_by_name,
    narrow_kind,
    operands,
    quantizer_of,
    reading_weight,
    restore,
    was_seen,
)
from qat_runner.insertion.modes import Inputs, call, inputs_of
from qat_runner.insertion.naming import merged_notes
from qat_runner.insertion.observing import ObservedProducts, attends, multiplies_by_its_weight, observe, own_weights
from qat_runner.insertion.own_products import (
    QuantAttention,
    attention_in,
    has_fast_path,
    is_multihead,
    keep_off_fast_path,
    names_are_free,
    products_as_before,
    quantize_own_products,
    release_own_products,
)
from qat_runner.insertion.own_weights import QuantOwnWeight, quantize_own_weights, release_own_weights
from qat_runner.insertion.products import Product, rest
from qat_runner.insertion.rotation import Hadamard, block_of
from qat_runner.insertion.tensors import tensors_of, whole
from qat_runner.insertion.trace import Trace, shows_values, trace
from qat_runner.insertion.unchanged import (
    Tensors,
    computed,
    computed_by_modules,
    difference,
    first_difference,
    tolerance,
)
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.policy import EMBEDDING, EXPERTS, Place, Policy, PolicyError, TensorPolicy, exactly
from qat_runner.quant import ClippingMethod, Estimator, Quantizer
from qat_runner.quant.tensors import recording
from qat_runner.quant.weight_groups import WeightsTogether


class QuantizationWarning(UserWarning):
    """A part of the model is not quantized, or not in the way one might expect."""


POLICY = "quantization_policy"
"""Attribute of a quantized model: its policy, in which rules for the first and last layer refer to these by name."""

PRODUCTS = "quantization_products"
"""Attribute of a quantized model that was traced: all of its products."""

LEFT = "quantization_left"
"""Attribute of a quantized model that was traced: the name of each layer or product in full precision -> elements of
its inputs, as in ELEMENTS."""


KNOWN = "convolution layers, linear layers, experts and attention"
"""What can be quantized, for messages."""


OwnWeights = dict[nn.Module, dict[str, int]]
"""Module -> the parameters of its own that it multiplies by, as `own_weights` returns them."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized tensor."""

    layer: str
    """name of the layer in the model, or in the network that it wraps"""
    tensor: str
    """ "weight" or "input"; for a product in attention "query", "key", "probabilities" or "value" """
    elements: int | None
    """number of elements of the weight; of one sample for any other tensor, None if no batch was seen yet"""
    quantizer: Quantizer
    module: nn.Module = field(repr=False)
    """the layer itself"""

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.tensor}"


def quantize_model(
    model: nn.Module,
    bits: int | Policy = 4,
    clipping: str | ClippingMethod = "octav",
    gradient: str | Estimator = "mph",
    *,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    **how: Any,
) -> nn.Module:
    """Quantize the weights and inputs of all convolutions and linear layers of a model, in place (Appendix E.2).

    Both operands of both matrix products of attention are quantized as well, and so are parameters by which the module
    that owns them multiplies, such as those of experts. To find such parameters, layers with a forward of their own,
    and attention that is neither PyTorch's nor uses transformers' interface, an example is required.

    The model keeps its class, its parameters and their names; a full-precision state dict still loads into it, and
    `full_precision_state_dict` returns one. The first convolution and the last linear layer get `first_last_bits`.

    Args:
        model: any model with such layers, or with attention. In DistributedDataParallel, DataParallel or torch.compile,
            the network inside is quantized, and rules refer to its layers by their names there.
        bits: 2 to 16, or 32 for full precision; or a whole `Policy`, which allows no further argument except `example`.
        clipping: a clipping method or its name: octav, max, percentile, mse_sweep; lsq or pact, whose clipping scalars
            are parameters and must be initialized by `calibrate`; or the name of a registered one.
        gradient: ste, pwl, mad, ewgs, trust, mph (mad for weights, pwl for activations) or the name of a registered
            one; or an estimator with its own options. lsq and pact have gradients of their own.
        example: a real batch, without labels: the input, a tuple of arguments of forward, or a mapping of their names
            to arguments, as the networks of transformers take it. Running it shows which inputs are signed, the order
            of the layers, and what would stay unquantized. Its values decide whether the network's own input is signed.
            Without it, layers are ordered by registration, and the rest is found on the first forward pass of the
            model.
        **how: further arguments of `Policy.of`: weight_bits, activation_bits, first_last_bits; format, weight_format,
            activation_format, range, weight_range, activation_range; dynamic, eval_mode, conv_granularity,
            linear_granularity, activation_granularity, quantize_head, keep, synchronize, rules, and the options of a
            clipping method that is given by name, e.g. q=99.9.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: an argument is out of range, a rule matches no tensor, there is nothing to quantize, or
            the model already has quantizers; a weight, or an input for the example, contains NaN or infinity; the
            example does not consist of the arguments of forward; or, on the example, the network with its quantizers
            switched off does not compute what it computed before, bit for bit. Only attention, and an output that
            varies from run to run, may differ by rounding, at most by the square root of the precision of the network's
            numbers. In a network of transformers, attention may do so only if it was another implementation than
            "eager": quantized attention computes what "eager" computes, bit for bit. After an error the model has no
            quantizers.

    Warns:
        QuantizationWarning: a part stays in full precision, or is shared (one sentence for each part); attention of
            transformers differs from "eager" by more than rounding; later, once: the network's own input has negative
            values although the example has none.
    """
    if isinstance(bits, Policy):
        if (clipping, gradient) != ("octav", "mph") or how:
            raise TypeError("quantize_model: next to a policy, example is the only argument allowed")
        policy = bits
    else:
        policy = Policy.of(bits, clipping, gradient, **how)
    with torch.inference_mode(False):  # the state of quantizers could not be trained otherwise
        insert(unwrapped(model), policy, example)
    return model


def insert(
    model: nn.Module,
    policy: Policy,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    tensors: Collection[str] | None = None,
    contracted: Mapping[str, int] | None = None,
) -> nn.Module:
    """As `quantize_model`, with a `Policy`.

    Args:
        model, example: as in `quantize_model`.
        policy: what every tensor gets.
        tensors: names of the tensors that are quantized in another instance of the same network, to be quantized here
            without an example; None: without an example, only what can be recognized by its class is quantized.
        contracted: `contracted_by(model)` of that other instance.
    """
    check_no_quantizers(model)
    inputs = None if example is None else inputs_of(model, example)
    if any(t is not None and t.is_nested for t in tensors_of(inputs)):
        raise ValueError("example: must not be a nested tensor, which cannot be quantized; pass a padded one")
    if policy.full_precision and _layers_in(model):
        return model
    asking, before = (None, None) if inputs is None else observe(model, inputs)
    layers, notes = _convertible(model, policy, asking, tensors)
    attention = _own_attention(model, asking, tensors)
    weights = _own_weights(model, asking, attention) if tensors is None else _own_weights_named(model, contracted or {})
    aside = _set_aside(model, attention, weights)
    if not (layers or attention or weights):
        if tensors is not None:
            missing = ", ".join(sorted({name.rpartition(".")[0] for name in tensors}))
            raise ValueError(f"it has none of the layers that are quantized in the other network: {one_line(missing)}")
        why = "".join(f"; {note}" for note in merged_notes([*notes.items(), *aside]))
        raise ValueError(f"{type(model).__name__} has no layer to quantize: {KNOWN} can be quantized{why}")
    other_attention = bool(attention_of(model) - {EAGER})
    try:
        layers = _converted(model, layers.values(), attention, weights)
        seen = None if inputs is None else call(partial(trace, model), inputs)
        if inputs is not None and seen is not None:
            _check_unchanged(model, inputs, tensors_of(before), tensors_of(seen.output), other_attention)
        ends = _ends(layers, seen)
        places = _places({**layers, **{name: model.get_submodule(name) for name in notes}}, ends)
        if tensors is None:  # with `tensors`, some layers are not converted, so a rule may match nothing
            _check_rules(places, policy)
        chosen = _chosen(places, policy)
        _equip_all(model, layers, chosen)
        if tensors is None:
            _check_finite(model, seen if any(map(_is_spoiled, tensors_of(inputs))) else None)
    except BaseException:
        remove_quantizers(model)
        raise
    for module in attention:
        release_own_products(module)
    for module in weights:
        release_own_weights(module)
    for module in model.modules():
        if not has_own_forward(module):
            keep_off_fast_path(module)
    setattr(model, POLICY, policy.resolved_for(places))
    left = [name for name in notes if not all(tensor.full_precision for tensor in chosen[name].values())]
    for note in merged_notes([*((name, notes[name]) for name in left), *aside]):
        _warn(note)
    if seen is not None:
        _decide(model, seen)
    else:
        model.register_forward_pre_hook(_decide_on_first_batch, with_kwargs=True)
    return model


def check_no_quantizers(model: nn.Module) -> None:
    """Raise an error if a model has quantizers.

    Raises:
        ValueError: it has.
    """
    if each(model, is_quantized):
        raise ValueError("the model already has quantizers: call remove_quantizers(model) first")


def _converted(
    model: nn.Module, layers: Iterable[nn.Module], attention: Iterable[nn.Module], weights: OwnWeights
) -> dict[str, nn.Module]:
    """Convert layers, attention and own weights, without quantizers yet; return all that may get some, by name."""
    quantize_attention(model)
    for module in attention:
        quantize_own_products(module)
    for module, of in weights.items():
        quantize_own_weights(module, of)
    for layer in layers:
        convert(layer)
    return dict(each(model, is_quantized))


def _equip_all(
    model: nn.Module, layers: Mapping[str, nn.Module], chosen: Mapping[str, Mapping[str, TensorPolicy]]
) -> None:
    """Give layers the quantizers that a policy specifies.

    Raises:
        PolicyError: it specifies none at all, or something impossible.
    """
    quantizers = {name: _quantizers(layer, chosen[name]) for name, layer in layers.items()}
    if not any(any(found.values()) for found in quantizers.values()):
        raise PolicyError(f"the policy leaves all of {type(model).__name__} in full precision")
    rotations = {name: _rotation(name, layer, chosen[name]) for name, layer in layers.items()}
    for name, found in quantizers.items():
        _equip(model, name, layers[name], found, rotations[name])


@torch.no_grad()
def _check_finite(model: nn.Module, seen: Trace | None) -> None:
    """Raise an error if a tensor that has a quantizer contains NaN or infinity.

    Args:
        model: with quantizers.
        seen: what an example has shown that contains such numbers itself; None for any other, with which a network may
            compute NaN on purpose, such as the attention of a sample that consists of padding.

    Raises:
        ValueError: there is one; the message names it.
    """
    calls = {} if seen is None else seen.layers
    tensors = quantized_tensors(model)
    for tensor in sorted(tensors, key=lambda t: t.tensor != "weight"):  # a bad weight spoils all inputs after it
        layer, operand = tensor.module, tensor.tensor
        if operand != "weight":
            bad, where = tensor.layer in calls and operand in calls[tensor.layer].nonfinite, " for the example"
        else:
            assert isinstance(layer, QuantLayer)
            with reading_weight(layer):
                weight = layer.qat_used_weight()
            bad, where = not (weight.is_meta or bool(whole(weight).isfinite().all())), ""
        if bad:
            raise ValueError(f"{tensor.name}: contains NaN or infinity{where}, so it has no clipping scalar")


def _is_spoiled(t: Tensor | None) -> bool:
    """Whether a tensor contains NaN or infinity and is not a mask of zeros and negative infinities."""
    if t is None or not shows_values(t) or bool(t.isfinite().all()):
        return False
    return not bool(((t == 0) | t.isneginf()).all())


def _check_unchanged(model: nn.Module, inputs: Inputs, before: Tensors, now: Tensors, other_attention: bool) -> None:
    """Raise an error if a converted model, still without quantizers, does not compute what it computed before.

    A model whose output varies from run to run is compared with `tolerance`.

    Args:
        model: with converted layers and products.
        inputs: of its forward.
        before: what it computed before.
        now: what it computes now.
        other_attention: whether its attention, by transformers' interface, was another implementation than "eager".

    Raises:
        PolicyError: it does not; the message names the module where the difference begins.

    Warns:
        QuantizationWarning: it does not, because that other implementation computes something different from "eager".
    """
    rounds = other_attention or bool(each(model, lambda m: isinstance(m, QuantAttention)))
    if not rounds and difference(before, now, 0) is None:
        return
    with products_as_before(model), attention_as(model):
        beside = computed(model, inputs) if rounds else now  # everything is converted except attention
    same, allowed = difference(before, beside, 0) is None, 0.0
    if not same and difference(now, computed(model, inputs), 0) is not None:  # its output varies from run to run
        allowed = tolerance(model)
        same = difference(before, beside, allowed) is None
    if same and difference(before, now, tolerance(model) if rounds else allowed) is None:
        return
    ours = computed_by_modules(model, inputs)
    with products_as_before(model), attention_as(model, EAGER):
        eager = computed_by_modules(model, inputs)
    with products_as_before(model), attention_as(model):
        theirs = computed_by_modules(model, inputs)
    parted = first_difference(eager, ours, tolerance(model) if same else allowed)
    if other_attention and same and parted is None:
        where, found = first_difference(theirs, ours, tolerance(model)) or ("", "")
        _warn(
            f"{_described(model, where)} does not compute the same as before ({found}): quantized attention is what "
            f"transformers calls 'eager', which differs here, as it may for fully masked rows such as padding"
        )
        return
    remove_quantizers(model)
    parted = parted or first_difference(computed_by_modules(model, inputs), theirs, allowed)
    where, found = parted or ("", "differs in what it returns")
    raise PolicyError(
        f"{_described(model, where)} does not compute the same with quantizers switched off as without them ({found})"
    )


def _described(model: nn.Module, name: str) -> str:
    """Return the name and class of a module, for messages."""
    kind = full_precision_name(model.get_submodule(name))
    return f"{name} ({kind})" if name else kind


def _layers_in(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what might be quantized: layers of known kinds, and PyTorch's own attention."""
    return each(model, lambda m: (layer_kind(m) is not None and not isinstance(m, nn.Embedding)) or is_multihead(m))


def _convertible(
    model: nn.Module, policy: Policy, asking: ObservedProducts | None, tensors: Collection[str] | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be quantized, and a note on each that looks like one but cannot be, by name."""
    layers: dict[str, nn.Module] = {}
    notes: dict[str, str] = {}
    for name, layer in each(model, lambda m: layer_kind(m) is not None):
        wanted = tensors is None or any(f"{name}.{operand}" in tensors for operand in operands(layer))
        if not wanted or (kind_of(layer) == EMBEDDING and not policy.names_kind(EMBEDDING)):
            continue
        with reading_weight(layer):
            weight: Any = layer.weight
        if isinstance(weight, nn.UninitializedParameter):
            notes[name] = "has no weight yet: left as it is"
        elif not weight.is_floating_point():
            notes[name] = f"has a weight of dtype {weight.dtype}: left as it is"
        elif has_own_forward(layer):
            notes[name] = f"{_OWN_FORWARD}: left as it is"
        elif getattr(layer, "max_norm", None) is not None:
            notes[name] = "changes its weight while using it (max_norm): left as it is"
        elif getattr(layer, "sparse", False):
            notes[name] = "has sparse gradients, which no gradient estimator supports: left as it is"
        elif is_plain(type(layer)) or tensors or (asking is not None and multiplies_by_its_weight(layer, asking)):
            layers[name] = layer
        else:
            what = type(layer).__name__
            notes[name] = f"is a {what}, which may compute something else than its base class: left as it is"
    return layers, notes


def _own_attention(
    model: nn.Module, asking: ObservedProducts | None, tensors: Collection[str] | None
) -> list[nn.Module]:
    """Return the attention modules whose own products can be quantized.

    Those that use transformers' interface are not among them.
    """
    served = modules_served(model)
    if tensors is not None:
        return attention_in(tensors, dict(each(model, lambda m: m not in served)))
    known = [m for m in model.modules() if is_multihead(m) and names_are_free(m)]
    attending = [m for m in model.modules() if m in known or (asking is not None and attends(m, asking))]
    return [m for m in attending if m not in served]


def _own_weights(model: nn.Module, asking: ObservedProducts | None, attention: Collection[nn.Module]) -> OwnWeights:
    """Return the modules that multiply by parameters of their own, except layers of known kinds and attention."""
    if asking is None:
        return {}
    others = {*attention, *modules_served(model), *(m for m in model.modules() if not _may_be_swapped(m))}
    found = {module: own_weights(module, asking) for module in model.modules() if module not in others}
    return {module: contracted for module, contracted in found.items() if contracted}


_OWN_FORWARD = "has a forward that was set on the instance and bypasses its class"


def _set_aside(model: nn.Module, attention: list[nn.Module], weights: OwnWeights) -> list[tuple[str, str]]:
    """Remove the modules whose instance-level forward would bypass a swapped class; return a note on each."""
    said = []
    for name, module in each(model, has_own_forward):
        if module in attention or module in weights:
            said.append((name, f"{_OWN_FORWARD}: its own products are left as they are"))
        elif has_fast_path(module):
            said.append((name, f"{_OWN_FORWARD}: in eval() PyTorch's fast path may bypass the layers in it"))
        weights.pop(module, None)
    attention[:] = [module for module in attention if not has_own_forward(module)]
    return said


def _may_be_swapped(module: nn.Module) -> bool:
    """Whether a module's class can be swapped and is not swapped for another reason."""
    return layer_kind(module) is None and not isinstance(module, UNSWAPPABLE) and not has_fast_path(module)


def _own_weights_named(model: nn.Module, contracted: Mapping[str, int]) -> OwnWeights:
    """Return the own weights that `contracted_by` reported for another instance of the same network.

    Raises:
        ValueError: the model has no such parameter.
    """
    found: OwnWeights = {}
    modules = dict(each(model, lambda m: True))
    for name, dim in contracted.items():
        of, _, parameter = name.rpartition(".")
        if of not in modules or getattr(modules[of]._parameters.get(parameter), "ndim", 0) < 2:
            raise ValueError(f"{type(model).__name__} has no parameter {name} that could be quantized")
        found.setdefault(modules[of], {})[parameter] = dim
    return found


def contracted_by(model: nn.Module) -> dict[str, int]:
    """Return the quantized parameters that their module multiplies by: name -> the summed dimension, -1 or -2."""
    found = each(model, lambda m: isinstance(m, QuantOwnWeight))
    return {f"{name.rpartition('.')[0]}.{m.parameter}".lstrip("."): m.contracted for name, m in found}  # type: ignore[misc]


def _places(layers: Mapping[str, nn.Module], ends: Mapping[str, Collection[str]]) -> list[Place]:
    """Return all operands of the layers."""
    return [
        (name, narrow_kind(layer), operand, ends.get(name, ()))
        for name, layer in layers.items()
        for operand in operands(layer)
    ]


def _check_rules(places: Sequence[Place], policy: Policy) -> None:
    """Raise an error if a rule of a policy matches no operand of the layers.

    Raises:
        PolicyError: there is such a rule.
    """
    for rule in policy.rules:
        if rule.usual or any(rule.matches(*place) for place in places):
            continue
        name, kind, operand, _ = places[0]
        what, such = (f" of type {rule.type!r}", f"{name}, a {kind},") if rule.type != "*" else ("", name)
        end = rule.match.partition(".")[0]
        named = rule.end and any(place[0].partition(".")[0] == end for place in places)
        raise PolicyError(
            f"rule {rule.match!r}{what} matches no layer or tensor that can be quantized (such as {such} or "
            f"{name}.{operand}){f'; to match a module named {end}, write {exactly(end)}' if named else ''}"
        )


def _chosen(places: Sequence[Place], policy: Policy) -> dict[str, dict[str, TensorPolicy]]:
    """Return what a policy specifies for each operand of each layer."""
    chosen: dict[str, dict[str, TensorPolicy]] = {}
    for place in places:
        chosen.setdefault(place[0], {})[place[2]] = policy.tensor(*place)
    return chosen


def _quantizers(layer: nn.Module, tensors: Mapping[str, TensorPolicy]) -> dict[str, Quantizer | None]:
    """Return a quantizer for each operand of a layer; None for full precision."""
    try:
        shapes = layer.qat_scalar_shapes() if isinstance(layer, QuantLayer) else {}
        found = {operand: tensor.quantizer(operand, shapes) for operand, tensor in tensors.items()}
    except ValueError as error:
        raise PolicyError(str(error)) from error
    weight = found.get("weight")
    several = weight is not None and weight.granularity != "tensor"
    if several and kind_of(layer) == EXPERTS and tensors["weight"].granularity == "tensor":
        weight.granularity = "expert"  # type: ignore[union-attr]
    return found


def _rotation(name: str, layer: nn.Module, tensors: Mapping[str, TensorPolicy]) -> Hadamard | None:
    """Return what both factors of a layer are rotated by; None: nothing.

    Raises:
        PolicyError: only one factor is to be rotated, the layer is not an nn.Linear, or its number of inputs is odd.
    """
    found = {tensor.rotation for tensor in tensors.values()}
    if found == {"none"} or all(tensor.full_precision for tensor in tensors.values()):
        return None
    if not isinstance(layer, QuantLinear):
        part = isinstance(layer, QuantLayer) and layer.qat_kind_name
        what = "part of a module" if part else full_precision_name(layer)
        raise PolicyError(f"{name}: rotation=hadamard is for nn.Linear layers only, and this is {what}")
    if len(found) > 1:
        raise PolicyError(f"{name}: rotation=hadamard must be set for both weight and input, not for one of them")
    if (block := block_of(layer.in_features)) == 1:
        raise PolicyError(f"{name}: rotation=hadamard needs an even number of inputs, not {layer.in_features}")
    return Hadamard(block)


def _equip(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    quantizers: Mapping[str, Quantizer | None],
    rotation: Hadamard | None,
) -> None:
    """Give a layer its quantizers, on its device; a layer that gets none returns to its full-precision class."""
    if not any(quantizers.values()) and isinstance(layer, Swapped):
        restore(layer)
        return
    beside = layer if isinstance(layer, Swapped) else model.get_submodule(name.rpartition(".")[0])
    near = next((t for m in (beside, model) for t in (*m.parameters(), *m.buffers())), None)
    for operand, quantizer in quantizers.items():
        if quantizer is not None:
            quantizer.name = f"{name}.{operand}"
            if near is not None:
                quantizer.to(near.device)
    give_quantizers(layer, quantizers)
    if rotation is not None:
        assert isinstance(layer, QuantLinear)
        layer.qat_rotate_by(rotation)
        if (of_input := quantizers["input"]) is not None:
            of_input.decide_sign(True)


def _ends(layers: Mapping[str, nn.Module], seen: Trace | None) -> dict[str, set[str]]:
    """Return which layers are first and last: the first convolution and the last linear layer, by name.

    If there is no convolution, or no linear layer, it is the first, or last, layer of any kind.
    """
    order = list(layers)
    if seen is not None:
        order = [name for name, calls in seen.layers.items() if name in layers and not calls.training_only]
    ends: dict[str, set[str]] = {}
    if order:
        first = next((name for name in order if kind_of(layers[name]).startswith("Conv")), order[0])
        last = next((name for name in reversed(order) if kind_of(layers[name]) == "Linear"), order[-1])
        ends.setdefault(first, set()).add("first")
        ends.setdefault(last, set()).add("last")
    return ends


def _decide(model: nn.Module, seen: Trace) -> None:
    """Set the signs and sizes of the inputs from a trace, once and for all, and warn of what the trace noticed."""
    modules = modules_by_name(model)
    in_full: dict[str, dict[str, int]] = {}
    for name, calls in seen.layers.items():
        layer = modules.get(name)  # a product without quantizers may have been removed
        if layer is None or not is_quantized(layer):
            in_full[name] = calls.elements
            continue
        for operand, signed in calls.signed.items():
            quantizer = quantizer_of(layer, operand)
            if isinstance(quantizer, Quantizer) and not quantizer.decided:
                quantizer.decide_sign(signed)
            if isinstance(quantizer, Quantizer) and operand in calls.by_values and not quantizer.format.signed:
                quantizer.register_forward_pre_hook(_Negatives())
        for operand in calls.mixed:
            if isinstance(quantizer := quantizer_of(layer, operand), Quantizer):
                quantizer.features = calls.elements[operand]
        setattr(layer, ELEMENTS, calls.elements)
    setattr(model, PRODUCTS, seen.products)
    setattr(model, LEFT, in_full)
    for note in seen.notes:
        _warn(note)
    passed_over = filter(partial(_passed_over, modules), seen.products)
    for left in rest(passed_over, sum(p.macs for p in seen.products)):
        _warn(f"{left} {'is' if len(left.modules) == 1 else 'are'} not quantized: only {KNOWN} are")


def _passed_over(modules: Mapping[str, nn.Module], product: Product) -> bool:
    """Whether a product belongs to a kind of module that no policy covers.

    Layers of known kinds that stay in full precision were reported before.
    """
    module = modules.get(product.module)
    return module is not None and layer_kind(module) is None and not is_quantized(module)


def _decide_on_first_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the model that decides signs and sizes on the first batch that does not fail.

    An empty batch shows neither.
    """
    given = [t for t in tensors_of((args, kwargs)) if t is not None]
    if given and not any(t.numel() for t in given):
        return
    _remove_hook(model, _decide_on_first_batch)
    try:
        with quantizers_disabled(model):
            seen = trace(model, *args, **kwargs)
    except BaseException:
        model.register_forward_pre_hook(_decide_on_first_batch, with_kwargs=True)
        raise
    _decide(model, seen)


class _Negatives:
    """A forward pre-hook that warns once if a quantizer that counts as unsigned by an example is given negative values.

    It looks at the first call in training, and at calls in eval mode that wait for the device in any case.
    """

    def __init__(self) -> None:
        self._trained = False

    def __call__(self, quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
        if recording() or not args or args[0].is_meta:
            return
        constant = quantizer.has_scalars and not (quantizer.dynamic and quantizer.eval_mode == "dynamic")
        if self._trained if quantizer.training else constant or not quantizer.checks:
            return
        self._trained = self._trained or quantizer.training
        if quantizer.format.signed:  # by a state that was loaded since
            _remove_hook(quantizer, self)
        elif bool((args[0] < 0).any()):
            _remove_hook(quantizer, self)
            _warn(
                f"{quantizer.name}: is given negative values, which are clipped to 0: it counts as unsigned, since the "
                f"example, or else the first batch, has no negative values; pass a real batch as the example"
            )


def _remove_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Remove a forward pre-hook by its function: its handle would not follow the module through copying."""
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _warn(note: str) -> None:
    warnings.warn(note, QuantizationWarning, stacklevel=2)


def quantized_tensors(model: nn.Module) -> list[QuantizedTensor]:
    """Return all quantized tensors of a model, in order of registration, weight before input.

    In DistributedDataParallel, DataParallel or torch.compile, layers have their names in the network inside.
    """
    found = []
    for name, layer in each(unwrapped(model), is_quantized):
        for operand in operands(layer):
            quantizer = quantizer_of(layer, operand)
            if isinstance(quantizer, Quantizer):
                found.append(QuantizedTensor(name, operand, elements_of(layer, operand), quantizer, layer))
    return found


def idle_layers(model: nn.Module) -> set[nn.Module]:
    """Return the quantized layers that no batch has reached so far, if one has reached others.

    A batch has reached a layer that was traced, and one whose inputs have scalars. If there is no such layer, the
    network itself was not in use yet, and nothing is known of its layers: none is returned.
    """
    layers = {layer for _, layer in each(model, is_quantized)}
    reached = {t.module for t in quantized_tensors(model) if t.tensor != "weight" and t.quantizer.has_scalars}
    reached |= set(filter(was_seen, layers))
    return layers - reached if reached else set()


def network_of(model: nn.Module) -> nn.Module:
    """Return the network that was quantized: the model, or what it wraps, as DistributedDataParallel does."""
    return next((module for module in model.modules() if POLICY in vars(module)), model)


def policy_of(model: nn.Module) -> Policy:
    """Return the policy that a model, or the network it wraps, was quantized with; an empty one if there is none.

    Its rules for the first and last layer refer to these layers by name.
    """
    policy: Policy = vars(network_of(model)).get(POLICY, Policy())
    return policy


def products_of(model: nn.Module) -> list[Product]:
    """Return the products that were traced in a model, or in the network it wraps.

    There are none if it was not traced yet, or if only a part of it was quantized and traced.
    """
    products: list[Product] = [] if outside(model) else vars(network_of(model)).get(PRODUCTS, [])
    return products


def left_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the layers and products in full precision, of a model that `products_of` knows: see LEFT."""
    left: dict[str, dict[str, int]] = vars(network_of(model)).get(LEFT, {})
    return left


def outside(model: nn.Module) -> str | None:
    """Return the name of a parameter that is not in the network that was quantized; None if there is none."""
    network = network_of(model)
    if network is model:
        return None
    inside = {id(p) for p in network.parameters()}
    return next((name for name, p in model.named_parameters() if id(p) not in inside), None)


def wanted(model: nn.Module, tensor: QuantizedTensor) -> TensorPolicy:
    """Return what a network's policy specifies for one of its tensors; a state loaded since may have made it static."""
    return policy_of(model).tensor(tensor.layer, narrow_kind(tensor.module), tensor.tensor)


def remember_seen(
    model: nn.Module, elements: Mapping[str, int], features: Mapping[str, int], products: Sequence[Product]
) -> None:
    """Take over what was traced in another instance of the same network, instead of tracing a first batch.

    Args:
        model: with quantizers; if some of their signs are undecided, its first batch decides them.
        elements: name of a tensor -> its elements for one sample.
        features: the same, for tensors whose quantizers need to know it.
        products: of the network; empty if they are not known.
    """
    if products:
        setattr(model, PRODUCTS, list(products))
    if all(t.quantizer.decided for t in quantized_tensors(model)):
        _remove_hook(model, _decide_on_first_batch)
    for name, count in elements.items():
        layer, _, operand = name.rpartition(".")
        module = model.get_submodule(layer)
        setattr(module, ELEMENTS, {**getattr(module, ELEMENTS, {}), operand: count})
    for tensor in quantized_tensors(model):
        tensor.quantizer.features = features.get(tensor.name)


def quantizers_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager under which the model computes in full precision."""
    return _switched([t.quantizer for t in quantized_tensors(model)], "enabled", False)


def checking(quantizers: Collection[Quantizer], whether: bool) -> AbstractContextManager[None]:
    """Context manager under which quantizers reject NaN and infinity in `eval()`, or do not; see `Quantizer.checks`."""
    return _switched(quantizers, "checks", whether)


@contextmanager
def _switched(quantizers: Collection[Quantizer], switch: str, value: bool) -> Iterator[None]:
    """Context manager under which an attribute of all quantizers has a value."""
    before = [getattr(q, switch) for q in quantizers]
    for q in quantizers:
        setattr(q, switch, value)
    try:
        yield
    finally:
        for q, earlier in zip(quantizers, before, strict=True):
            setattr(q, switch, earlier)


def weights_together(model: nn.Module, bucket: int | None = None) -> WeightsTogether:
    """Return the quantizers of a model's weights, for training steps: see `WeightsTogether`.

    Args:
        model: quantized. A weight that is recomputed for each call, as by pruning, is quantized where it is used.
        bucket: as in `WeightsTogether`.
    """
    weights = [t for t in quantized_tensors(model) if t.tensor == "weight"]
    parameters = [t.module.qat_used_parameter() for t in weights]  # type: ignore[operator]
    return WeightsTogether([(t.quantizer, p) for t, p in zip(weights, parameters, strict=True)], bucket)


def remove_quantizers(model: nn.Module) -> nn.Module:
    """Remove all quantizers, in place; the weights remain the full-precision ones that were trained.

    Raises:
        ValueError: something else, fully_shard for example, has changed the class of a layer since; nothing is removed.
    """
    swapped = [module for _, module in each(model, lambda m: isinstance(m, Swapped))]
    for module in swapped:
        full_precision_class(module)
    restore_attention(model)
    for module in swapped:
        restore(module)
    for module in model.modules():
        for name in {POLICY, PRODUCTS, LEFT, ELEMENTS} & vars(module).keys():
            delattr(module, name)
        _remove_hook(module, _decide_on_first_batch)
    return model


def full_precision_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return a quantized model's state dict without its quantizers: it loads strictly into the full-precision model.

    Of DistributedDataParallel, DataParallel or torch.compile, it is that of the network inside.
    """
    model = unwrapped(model)
    state: dict[str, Any] = model.state_dict()
    prefixes = tuple(f"{n}." for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantizer))
    for key in [key for key in state if key.startswith(prefixes)] if prefixes else []:
        del state[key]
    return state


@torch.no_grad()
def scalars(model: nn.Module) -> dict[str, Tensor]:
    """Return how far the latest clipping scalars of quantized tensors reach from zero, by name, where there are any."""
    return {
        t.name: t.quantizer.format.reach(t.quantizer.last_s)
        for t in quantized_tensors(model)
        if t.quantizer.last_s is not None
    }
