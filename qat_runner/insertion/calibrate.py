"""Calibration and freezing: clipping scalars that are found once and stay static from then on.

Calibration sets the clipping scalars of static quantizers before training (section 5). Freezing makes dynamic
quantizers static after training, because inference needs constants. Both can be restricted to a part of the network.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qat_runner.insertion.insert import (
    QuantizationWarning,
    QuantizedTensor,
    idle_layers,
    quantized_tensors,
    quantizers_disabled,
)
from qat_runner.insertion.layers import QuantLayer, reading_weight
from qat_runner.insertion.tensors import whole
from qat_runner.insertion.watch import Batches, watch
from qat_runner.policy import FREEZING
from qat_runner.quant import Quantizer
from qat_runner.quant.tokens import NOT_CONSTANT


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches, layers: str | Sequence[str] | None = None) -> int:
    """Set every quantizer's clipping scalars to the mean of those that its clipping method finds on each batch.

    During calibration the network runs in full precision and in eval mode (BatchNorm uses its running statistics); its
    training flags are restored. Layers that are used only in training get the inputs that they would get there. Weights
    get the scalars of the weights themselves.

    Args:
        model: with static quantizers, or with dynamic ones that will be used with eval_mode running or last.
        batches: a few random training batches (the paper: 5), without labels, each an input tensor, a tuple of
            arguments of forward, or a mapping of their names to arguments.
        layers: globs over names of layers (`layer4.*`) or of quantized tensors (`*.input`): only these get scalars;
            None: all. Tensors with one scalar per token are skipped.

    Returns:
        The number of batches used.

    Raises:
        ValueError: there is no batch, a tensor holds NaN or infinity, or a glob matches nothing.
        TypeError: `batches` is a tensor, or a batch does not consist of the arguments of forward alone.

    Warns:
        QuantizationWarning: no batch reached some inputs. They are listed by name and have no clipping scalars;
            using them without scalars raises NotCalibratedError.
    """
    tensors = [t for t in _chosen(model, layers) if not t.quantizer.per_token]
    weights = [t for t in tensors if t.tensor == "weight"]
    activations = [t for t in tensors if t.tensor != "weight"]
    of_weights = [_weight_scalars(t) for t in weights]  # first: a bad weight spoils all inputs after it
    used, scalars = _full_precision_scalars(model, activations, batches)
    for t, of_weight in zip(weights, of_weights, strict=True):
        t.quantizer.assign(of_weight, used)
    for t, s in zip(activations, scalars, strict=True):
        if s is not None:
            t.quantizer.assign(s, used)
    unreached = [t.name for t, s in zip(activations, scalars, strict=True) if s is None]
    if unreached:
        warnings.warn(
            f"{', '.join(unreached)}: not reached by any calibration batch, so no clipping scalars were found",
            QuantizationWarning,
            stacklevel=2,
        )
    return used


@torch.no_grad()
def freeze(
    model: nn.Module, rule: str = "averaged", batches: Batches = (), layers: str | Sequence[str] | None = None
) -> nn.Module:
    """Make every dynamic quantizer static, in place, so that inference uses constant clipping scalars.

    A weight gets the scalars of its present values. An activation gets its scalars by the rule:

    ==========  ========================================================================================
    rule        scalars of an activation
    ==========  ========================================================================================
    averaged    the mean of those that the quantized network solves on each batch, in eval mode
    calibrated  the mean of those that the full-precision network would have (`calibrate`: static-OCTAV)
    running     the running average of those seen in training; needs no batches
    ==========  ========================================================================================

    Quantizers that are already static or learned keep their scalars.

    Args:
        model: trained, with quantizers.
        rule: see above.
        batches: training batches, as in `calibrate`; needed by averaged and calibrated if an activation is dynamic.
        layers: globs over names of layers (`layer4.*`) or of quantized tensors (`*.input`): only these are frozen;
            None: all.

    Returns:
        The same model.

    Raises:
        ValueError: the rule is unknown, or a glob matches nothing; the rule needs batches and there are none, or it
            needs training and there was none; no batch reaches an activation that was in use before, or an activation
            has one scalar per token, which cannot be constant. Nothing is frozen then.

    Warns:
        QuantizationWarning: some activations were never in use, neither for the example, nor in training, nor for the
            batches, while others were. They become static without scalars; using them raises NotCalibratedError.
    """
    if rule not in FREEZING:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join(FREEZING)}")
    dynamic = [t for t in _chosen(model, layers) if t.quantizer.dynamic]
    activations = [t for t in dynamic if t.tensor != "weight"]
    check_constant({t.name: t.quantizer for t in activations})
    scalars = _scalars_by_rule(model, rule, activations, batches)
    for tensor, s in zip(activations, scalars, strict=True):
        tensor.quantizer.freeze(s)
    never = [tensor.name for tensor, s in zip(activations, scalars, strict=True) if s is None]
    if never:
        warnings.warn(
            f"{', '.join(never)}: never in use so far, so there are no clipping scalars",
            QuantizationWarning,
            stacklevel=2,
        )
    for tensor in dynamic:
        if tensor.tensor == "weight":
            tensor.quantizer.freeze(_weight_scalars(tensor))
    return model


def check_constant(quantizers: Mapping[str, Quantizer]) -> None:
    """Raise an error if the scalars of a quantizer cannot be constants.

    Raises:
        ValueError: a quantizer has one scalar per token; the message names it.
    """
    for name, quantizer in quantizers.items():
        if quantizer.per_token:
            raise ValueError(f"{name} {NOT_CONSTANT}")


def _chosen(model: nn.Module, layers: str | Sequence[str] | None) -> list[QuantizedTensor]:
    """Return the quantized tensors that the globs match."""
    tensors = quantized_tensors(model)
    if layers is None:
        return tensors
    chosen: dict[str, QuantizedTensor] = {}
    for glob in [layers] if isinstance(layers, str) else layers:
        found = {t.name: t for t in tensors if fnmatchcase(t.layer, glob) or fnmatchcase(t.name, glob)}
        if not found:
            raise ValueError(f"layers={glob!r}: matches no quantized layer (such as {tensors[0].layer})")
        chosen |= found
    return list(chosen.values())


def _scalars_by_rule(
    model: nn.Module, rule: str, activations: Sequence[QuantizedTensor], batches: Batches
) -> list[Tensor | None]:
    """Return the scalars of activations, None for those that were never in use."""
    if not activations:
        return []
    if rule == "running":
        idle = idle_layers(model)
        untrained = [t.name for t in activations if not (t.quantizer.has_scalars or t.module in idle)]
        if untrained:
            raise ValueError(
                f"rule='running': {', '.join(untrained)} has not been trained, so it has no running average; use "
                f"'averaged' with batches instead"
            )
        return [
            t.quantizer.with_orientation(t.quantizer.running_s) if t.quantizer.has_scalars else None
            for t in activations
        ]
    mean_scalars = _full_precision_scalars if rule == "calibrated" else _quantized_scalars
    _, scalars = mean_scalars(model, activations, batches)
    idle = idle_layers(model)  # known now, if not before
    unreached = [t.name for t, s in zip(activations, scalars, strict=True) if s is None and t.module not in idle]
    if unreached:
        raise ValueError(
            f"{', '.join(unreached)}: not reached by any batch, so there are no scalars to freeze; pass other batches, "
            f"or freeze a part of the network with layers=..."
        )
    return scalars


def _weight_scalars(tensor: QuantizedTensor) -> Tensor:
    """Return the scalars of a weight's present values."""
    layer = tensor.module
    assert isinstance(layer, QuantLayer)
    with reading_weight(layer):
        return tensor.quantizer.scalars_of(whole(layer.qat_used_weight()))


MeanScalars = tuple[int, list[Tensor | None]]
"""The number of batches; and for each tensor the mean of its scalars over all calls, None if there was no call."""


def _full_precision_scalars(model: nn.Module, tensors: Sequence[QuantizedTensor], batches: Batches) -> MeanScalars:
    """Return the mean scalars of tensors in the full-precision network."""
    with quantizers_disabled(model):
        return _mean_scalars(model, tensors, batches, Quantizer.scalars_of)


def _quantized_scalars(model: nn.Module, tensors: Sequence[QuantizedTensor], batches: Batches) -> MeanScalars:
    """Return the mean scalars that dynamic quantizers solve in the quantized network."""

    def latest(quantizer: Quantizer, x: Tensor) -> Tensor:
        return quantizer.latest().float()

    modes = [t.quantizer.eval_mode for t in tensors]
    try:
        for t in tensors:
            t.quantizer.eval_mode = "dynamic"
        return _mean_scalars(model, tensors, batches, latest)
    finally:
        for t, mode in zip(tensors, modes, strict=True):
            t.quantizer.eval_mode = mode


def _mean_scalars(
    model: nn.Module,
    tensors: Sequence[QuantizedTensor],
    batches: Batches,
    scalars_of: Callable[[Quantizer, Tensor], Tensor],
) -> MeanScalars:
    """Return the means of `scalars_of` over all calls of the tensors' quantizers (section 5).

    Where scalars have signs, it is the mean of their magnitudes, with the sign of the majority.
    """
    wanted = {t.quantizer for t in tensors}
    found: dict[Quantizer, tuple[int, Tensor]] = {}

    def look(quantizer: Quantizer, x: Tensor) -> None:
        if quantizer in wanted:
            s = scalars_of(quantizer, x)
            both = torch.stack([s.abs(), s.sign()])
            calls, means = found.get(quantizer, (0, both))
            found[quantizer] = calls + 1, means.lerp(both, 1 / (calls + 1))

    used = watch(model, batches, look, unreached=lambda: wanted - found.keys())
    if used == 0:
        raise ValueError("calibration needs at least one batch")
    means = [found[t.quantizer][1] if t.quantizer in found else None for t in tensors]
    return used, [None if mean is None else torch.copysign(*mean) for mean in means]
