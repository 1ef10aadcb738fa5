"""Putting quantizers into a model, listing them, and taking them out again."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from qat_runner.insertion.attention import quantize_attention, restore_attention
from qat_runner.insertion.layers import (
    LAYERS,
    QuantMatmul,
    convert,
    each,
    is_quantized,
    operands,
    quantizer_of,
    restore,
)
from qat_runner.insertion.policy import FULL_PRECISION, GRADIENT_PAIRS, Policy
from qat_runner.insertion.trace import Trace, trace
from qat_runner.quant import LEARNED, DoReFaQuantizer, LearnedQuantizer, Quantizer


class QuantizationWarning(UserWarning):
    """Part of the model is not quantized, or not as one might expect."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor that is quantized."""

    layer: str
    """name of the layer in the model"""
    tensor: str
    """ "weight" or "input"; of a product in attention "query", "key", "probabilities" or "value" """
    elements: int | None
    """elements of the weight; of the others for one sample, None while no batch was seen"""
    quantizer: Quantizer

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.tensor}"


def quantize_model(
    model: nn.Module,
    bits: int = 4,
    clipping: str | Callable[..., Tensor] = "octav",
    gradient: str = "mph",
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    first_last_bits: int | None = 8,
    warm_iterations: int | None = 6,
    dynamic: bool = True,
    eval_mode: str = "dynamic",
    conv_granularity: str = "channel",
    linear_granularity: str = "tensor",
    quantize_head: bool = True,
    keep: Sequence[str] = (),
    synchronize: bool = False,
    example: Tensor | tuple[Any, ...] | None = None,
    **clipping_options: Any,
) -> nn.Module:
    """Quantize the weights and inputs of all Conv2d and Linear layers of a model, in place (Appendix E.2).

    In a network of transformers, both operands of both matrix products of attention are quantized as well.

    The model keeps its class, its parameters and their names; a full-precision state dict loads into it as before, and
    `full_precision_state_dict` gives one back. The first convolution and the last linear layer get `first_last_bits`.

    Args:
        model: any model of nn.Conv2d and nn.Linear layers.
        bits: 2 to 16, or 32 for full precision; for weights and activations unless given apart.
        clipping: octav, max, percentile, mse_sweep, or a function (x, bits, signed, dim, *, check) -> s; lsq or pact,
            whose scalars are parameters, and which need `calibrate` for their start.
        gradient: ste, pwl, mad, or mph (mad for weights, pwl for activations); lsq and pact have their own.
        weight_bits, activation_bits: override `bits`.
        first_last_bits: bits at the two ends, weights and inputs; None: as everywhere.
        warm_iterations: octav's reads of a tensor a training step, from the previous step's scalar; None: start anew.
        dynamic: solve the clipping scalars on each call; otherwise `calibrate` must be called before the first
            forward pass.
        eval_mode: what activation quantizers do in eval(): dynamic, running or last.
        conv_granularity, linear_granularity: "channel" (one scalar per output channel) or "tensor", for weights; those
            of pact have one per tensor, as published.
        synchronize: solve activation scalars in training on the batch of all processes of torch.distributed together
            (dynamic octav and max); weights have the same scalars everywhere.
        quantize_head: whether the last linear layer is quantized.
        keep: names of layers that are left in full precision.
        example: a real batch (or the tuple of arguments of forward). Running it once tells which inputs are signed, the
            order of the layers, and what would be passed over. Without it, order means order of registration, and the
            rest is found on the first forward pass of the model.
        **clipping_options: options of the clipping method, e.g. q=99.9.

    Returns:
        The same model.

    Raises:
        ValueError: an argument out of range, nothing to quantize, or quantizers already there.

    Warns:
        QuantizationWarning: what is left in full precision, or is shared: named, a sentence each.
    """
    policy = Policy(
        weight_bits=bits if weight_bits is None else weight_bits,
        activation_bits=bits if activation_bits is None else activation_bits,
        first_last_bits=first_last_bits,
        clipping=clipping,
        clipping_options=clipping_options,
        warm_iterations=warm_iterations,
        dynamic=dynamic,
        gradient=gradient,
        eval_mode=eval_mode,
        conv_granularity=conv_granularity,
        linear_granularity=linear_granularity,
        synchronize=synchronize,
        quantize_head=quantize_head,
        keep=tuple(keep),
    )
    return insert(model, policy, example)


def insert(model: nn.Module, policy: Policy, example: Tensor | tuple[Any, ...] | None = None) -> nn.Module:
    """`quantize_model` with a ready policy."""
    if each(model, is_quantized):
        raise ValueError("the model holds quantizers already: remove_quantizers(model) takes them out")
    layers, notes = _convertible(model, policy.keep)
    if not layers:
        why = "".join(f"; {note}" for note in notes)
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d or nn.Linear layer to quantize{why}")
    if policy.full_precision:
        return model
    quantize_attention(model)
    products = dict(each(model, lambda m: isinstance(m, QuantMatmul)))
    layers |= products
    seen = None if example is None else trace(model, *(example if isinstance(example, tuple) else (example,)))
    called = [] if seen is None else [name for name, calls in seen.layers.items() if not calls.training_only]
    first, last = _ends([name for name in called if name in layers] if seen else list(layers), layers)
    if not policy.quantize_head and isinstance(layers.get(last), nn.Linear):
        del layers[last]
    for name, layer in layers.items():
        beside = layer if name not in products else model.get_submodule(name.rpartition(".")[0])
        device = next(beside.parameters()).device
        quantizers = {operand: _quantizer(layer, policy, operand, name in (first, last)) for operand in operands(layer)}
        for operand, quantizer in quantizers.items():
            if quantizer is not None:
                quantizer.name = f"{name}.{operand}"
                quantizer.to(device)
        convert(layer, quantizers)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # its fast path in eval() reads weights past their layers
            module.register_forward_pre_hook(_no_fast_path)
    for note in notes:
        _warn(note)
    if seen is not None:
        _decide(model, seen)
    else:
        model.register_forward_pre_hook(_decide_on_first_batch, with_kwargs=True)
    return model


def _convertible(model: nn.Module, keep: Sequence[str]) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers that can be quantized, by name, and a sentence for each that looks like one but cannot."""
    layers: dict[str, nn.Module] = {}
    notes = []
    candidates = each(model, lambda m: isinstance(m, tuple(LAYERS)))
    for name in keep:
        if name not in dict(candidates):
            raise ValueError(f"keep={name!r}: the model has no Conv2d or Linear layer of that name")
    for name, layer in candidates:
        if name in keep:
            continue
        if type(layer) not in LAYERS:
            notes.append(
                f"{name} is a {type(layer).__name__}, which may not compute what its base class does: left as it is"
            )
        elif not _weight(layer).is_floating_point():
            notes.append(f"{name} has a weight of dtype {_weight(layer).dtype}: left as it is")
        else:
            layers[name] = layer
    return layers, notes


def _weight(layer: nn.Module) -> Tensor:
    """The weight [K, ...] that a layer computes with, be it a parameter or what pruning makes of one."""
    return layer.weight  # type: ignore[return-value]


def _ends(order: list[str], layers: dict[str, nn.Module]) -> tuple[str, str]:
    """Names of the first convolution and the last linear layer, or of the first and last layer where there is none."""
    if not order:
        return "", ""
    first = next((name for name in order if isinstance(layers[name], nn.Conv2d)), order[0])
    last = next((name for name in reversed(order) if isinstance(layers[name], nn.Linear)), order[-1])
    return first, last


def _quantizer(layer: nn.Module, policy: Policy, tensor: str, end: bool) -> Quantizer | None:
    """The quantizer of an operand of a layer; None for full precision."""
    bits = policy.bits(tensor, end)
    if bits == FULL_PRECISION:
        return None
    weight = tensor == "weight"
    signed, shape = (True, policy.weight_shape(layer)) if weight else (None, ())
    quantizer: Quantizer
    if policy.clipping == "pact" and weight:
        quantizer = DoReFaQuantizer(bits)
    elif policy.clipping in LEARNED:
        quantizer = LearnedQuantizer(policy.clipping, bits, signed, shape, not weight, **policy.clipping_options)
    else:
        quantizer = Quantizer(
            bits,
            signed,
            shape,
            policy.clipping,
            GRADIENT_PAIRS[policy.gradient][0 if weight else 1],
            dynamic=policy.dynamic,
            eval_mode="dynamic" if weight else policy.eval_mode,
            warm_iterations=policy.warm_iterations,
            synchronize=policy.synchronize and not weight,
            **policy.clipping_options,
        )
    return quantizer


def _decide(model: nn.Module, seen: Trace) -> None:
    """Signs and sizes of the inputs, once and for all; what was noticed is said."""
    for name, calls in seen.layers.items():
        layer = model.get_submodule(name)
        if not is_quantized(layer):
            continue
        for operand, signed in calls.signed.items():
            quantizer = quantizer_of(layer, operand)
            if isinstance(quantizer, Quantizer) and not quantizer.decided:
                quantizer.decide_sign(signed)
        layer.elements_seen = calls.elements  # type: ignore[assignment]
    for note in seen.notes:
        _warn(note)


def _decide_on_first_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook, of the model, that works once."""
    _remove_hook(model, _decide_on_first_batch)
    with quantizers_disabled(model):
        seen = trace(model, *args, **kwargs)
    _decide(model, seen)


def _no_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: having one is what counts."""


def _remove_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Remove a forward pre-hook by what it is: its handle would not follow the module through copying."""
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _warn(note: str) -> None:
    warnings.warn(note, QuantizationWarning, stacklevel=2)


def quantized_tensors(model: nn.Module) -> list[QuantizedTensor]:
    """All quantized tensors of a model, in order of registration, weight before input."""
    found = []
    for name, layer in each(model, is_quantized):
        for operand in operands(layer):
            quantizer = quantizer_of(layer, operand)
            if isinstance(quantizer, Quantizer):
                seen = getattr(layer, "elements_seen", {}).get(operand)
                elements = _weight(layer).numel() if operand == "weight" else seen
                found.append(QuantizedTensor(name, operand, elements, quantizer))
    return found


def summary(model: nn.Module) -> str:
    """A table of the quantized tensors, elements of an input being those of one sample; and what is not quantized."""
    rows = [
        (
            t.layer,
            t.tensor,
            t.quantizer.bits,
            _sign(t.quantizer),
            t.quantizer.granularity,
            t.quantizer.mode,
            t.elements or "?",
        )
        for t in quantized_tensors(model)
    ]
    table = tabulate(rows, headers=("layer", "tensor", "bits", "signed", "granularity", "scalars", "elements"))
    left = _left(model)
    return f"{table}\n\nin full precision: {', '.join(left)}" if rows and left else table


def _left(model: nn.Module) -> list[str]:
    """Kinds of modules with parameters that are not quantized, each with its number, or with its name if it is one."""
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if (
            not (is_quantized(module) or isinstance(module, Quantizer))
            and next(module.parameters(recurse=False), None) is not None
        ):
            names.setdefault(type(module).__name__, []).append(name)
    left = [f"{kind} {found[0]}" if len(found) == 1 else f"{len(found)} {kind}" for kind, found in names.items()]
    return [*left, *(["softmax"] if each(model, lambda m: isinstance(m, QuantMatmul)) else [])]


def _sign(quantizer: Quantizer) -> str:
    return ("yes" if quantizer.signed else "no") if quantizer.decided else "?"


@contextmanager
def quantizers_disabled(model: nn.Module) -> Iterator[None]:
    """While open, the model computes in full precision."""
    quantizers = [t.quantizer for t in quantized_tensors(model)]
    before = [q.enabled for q in quantizers]
    for q in quantizers:
        q.enabled = False
    try:
        yield
    finally:
        for q, enabled in zip(quantizers, before, strict=True):
            q.enabled = enabled


def weights_quantized_once(model: nn.Module) -> AbstractContextManager[None]:
    """While open, each weight is quantized at its first use only: for gradients that add up over several batches."""
    return Quantizer.reusing([t.quantizer for t in quantized_tensors(model) if t.tensor == "weight"])


def remove_quantizers(model: nn.Module) -> nn.Module:
    """Take all quantizers out again, in place; the weights stay the full-precision ones that were trained."""
    restore_attention(model)
    for _, layer in each(model, is_quantized):
        restore(layer)
    for module in model.modules():
        _remove_hook(module, _decide_on_first_batch)
        _remove_hook(module, _no_fast_path)
    return model


def full_precision_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a quantized model without its quantizers: loads strictly into the full-precision model."""
    prefixes = tuple(f"{name}." for name, _ in each(model, lambda m: isinstance(m, Quantizer)))
    return (
        {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
        if prefixes
        else model.state_dict()
    )


@torch.no_grad()
def scalars(model: nn.Module) -> dict[str, Tensor]:
    """Name of each quantized tensor -> the clipping scalars of its latest call; tensors never seen are left out."""
    return {t.name: t.quantizer.last_s for t in quantized_tensors(model) if t.quantizer.last_s is not None}
