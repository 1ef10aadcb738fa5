"""Calibration and freezing: clipping scalars that are found once, and then held.

Calibration gives static quantizers their scalars before training (section 5). Freezing gives dynamic ones scalars to
hold after it, since inference wants them as constants.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qat_runner.insertion.insert import QuantizedTensor, quantized_tensors
from qat_runner.insertion.watch import Batches, watch
from qat_runner.quant import Quantizer

FREEZING = ("averaged", "calibrated", "running")
"""Rules by which scalars are frozen, see `freeze`."""


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches) -> int:
    """Set every quantizer's scalars to the mean of those that its clipping method finds on each batch.

    Meanwhile the network runs in full precision and in eval mode (BatchNorm with its running statistics); its training
    flags are restored. Weights come out with the scalars of the weights themselves.

    Args:
        model: with static quantizers, or dynamic ones that are to be used with eval_mode running or frozen.
        batches: a few random training batches (the paper: 5), each an input tensor or a tuple of arguments of forward.

    Returns:
        How many batches were used.

    Raises:
        ValueError: no batch, or NaN or infinity in a tensor.
    """
    return _calibrate(model, [t.quantizer for t in quantized_tensors(model)], batches)


@torch.no_grad()
def freeze(model: nn.Module, rule: str = "averaged", batches: Batches = ()) -> nn.Module:
    """Make every dynamic quantizer static, in place, so that inference finds its scalars ready.

    A weight gets the scalars of the weight as it is now. An activation gets them by the rule:

    | rule       | scalars of an activation                                                                       |
    |------------|------------------------------------------------------------------------------------------------|
    | averaged   | the mean of those that the quantized network solves on each batch, in eval mode                |
    | calibrated | the mean of those that the full-precision network would have (`calibrate`: static-OCTAV)       |
    | running    | the running average of those of training, without any batch                                    |

    Quantizers that are static or learned already keep their scalars.

    Args:
        model: trained, with quantizers.
        rule: see above.
        batches: training batches, for averaged and calibrated, where an activation is dynamic.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown rule; no batches where the rule needs them, or no training where it needs that.
    """
    if rule not in FREEZING:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join(FREEZING)}")
    dynamic = [t for t in quantized_tensors(model) if t.quantizer.dynamic]
    activations = [t for t in dynamic if t.tensor != "weight"]
    scalars = _scalars_by_rule(model, rule, activations, batches)
    for tensor, s in zip(activations, scalars, strict=True):
        tensor.quantizer.freeze(s)
    for tensor in dynamic:
        if tensor.tensor == "weight":
            q, weight = tensor.quantizer, model.get_submodule(tensor.layer).weight
            q.freeze(q.solve(weight, q.bits, q.signed, q.dim, check=True))
    return model


def hold_activations(model: nn.Module) -> list[Quantizer]:
    """Make the activations' dynamic quantizers static, with the running average of their scalars; returns them.

    Weights' quantizers stay dynamic: for training that goes on.
    """
    held = [t.quantizer for t in quantized_tensors(model) if t.tensor != "weight" and t.quantizer.dynamic]
    for quantizer in held:
        quantizer.freeze(quantizer.running_s)
    return held


def _scalars_by_rule(
    model: nn.Module, rule: str, activations: Sequence[QuantizedTensor], batches: Batches
) -> list[Tensor]:
    if not activations:
        return []
    if rule == "averaged":
        return _average(model, activations, batches)
    if rule == "calibrated":
        _calibrate(model, [t.quantizer for t in activations], batches)
        return [t.quantizer.s for t in activations]
    untrained = next((t for t in activations if not t.quantizer.batches), None)
    if untrained is not None:
        raise ValueError(f"rule='running': {untrained.name} has seen no training; 'averaged' takes batches instead")
    return [t.quantizer.running_s for t in activations]


def _calibrate(model: nn.Module, quantizers: Sequence[Quantizer], batches: Batches) -> int:
    """`calibrate` for some of the quantizers, all others disabled meanwhile; returns how many batches there were."""
    idle = [t.quantizer for t in quantized_tensors(model) if t.quantizer not in {*quantizers}]
    enabled = [q.enabled for q in idle]
    with ExitStack() as stack:
        for quantizer in quantizers:
            stack.enter_context(quantizer.calibrating())
        for quantizer in idle:
            quantizer.enabled = False
        try:
            return _run(model, batches)
        finally:
            for quantizer, before in zip(idle, enabled, strict=True):
                quantizer.enabled = before


def _average(model: nn.Module, tensors: Sequence[QuantizedTensor], batches: Batches) -> list[Tensor]:
    """Mean scalars of dynamic quantizers in the quantized network."""
    found: dict[Quantizer, list[Tensor]] = {t.quantizer: [] for t in tensors}

    def keep(quantizer: Quantizer, x: Tensor) -> None:
        if quantizer in found and quantizer.last_s is not None:
            found[quantizer].append(quantizer.last_s.float())

    modes = [quantizer.eval_mode for quantizer in found]
    try:
        for quantizer in found:
            quantizer.eval_mode = "dynamic"
        _run(model, batches, keep)
    finally:
        for quantizer, mode in zip(found, modes, strict=True):
            quantizer.eval_mode = mode
    unseen = next((t.name for t in tensors if not found[t.quantizer]), None)
    if unseen is not None:
        raise ValueError(f"{unseen} was not reached by any batch, so it has no scalar to freeze")
    return [torch.stack(scalars).mean(0) for scalars in found.values()]


def _run(model: nn.Module, batches: Batches, look: Callable[[Quantizer, Tensor], None] | None = None) -> int:
    """`watch`, which must have something to run on."""
    used = watch(model, batches, look)
    if used == 0:
        raise ValueError("calibration needs at least one batch")
    return used
