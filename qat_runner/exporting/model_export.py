"""Export of your own network, trained in your own loop, as integers in a file: `qat.export`."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.exporting.folding import fold_batchnorm
from qat_runner.exporting.formats import Signature, several_samples, write_onnx, write_program, write_safetensors
from qat_runner.exporting.integer import to_integers
from qat_runner.insertion import freeze, quantized_tensors
from qat_runner.insertion.calibrate import check_constant
from qat_runner.insertion.layers import refresh
from qat_runner.insertion.modes import uncompiled
from qat_runner.insertion.saving import check_target
from qat_runner.insertion.wrappers import is_sharded, unwrapped
from qat_runner.runs.files import explaining_full_disk
from qat_runner.tasks import fields_of

SUFFIXES = (".onnx", ".pt2", ".safetensors")


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | Sequence[Tensor],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    longest: int | None = None,
    fold: bool = True,
) -> nn.Module:
    """Write a quantized network as integers; the model itself is not changed.

    Args:
        model: with quantizers, and static clipping scalars for its activations (see `freeze`); of data parallelism and
            torch.compile, the network inside. Dynamic clipping scalars of its weights are solved for the present
            weights. What is not quantized is written in float32, whatever its dtype was.
        path: ends in .onnx (QuantizeLinear and DequantizeLinear with true integer types), .pt2 (a program of
            torch.export, which runs with PyTorch alone) or .safetensors (codes and step sizes; a .json file beside it
            describes them).
        example: the arguments of forward, in order, with the same number of samples in the first dimension of each
            tensor. The exported network takes any number of samples; all other sizes are fixed.
        inputs: names of the arguments in the file; None: input, or input_0, input_1, ...
        outputs: names of what forward returns, or of the fields of its result that the file should return; None:
            output, or output_0, output_1, ..., or all fields that are tensors.
        longest: the largest size of the second dimension, such as the tokens of a text, which is then variable in all
            inputs that have one; None: it is fixed.
        fold: whether to fold BatchNorm into the step sizes of the convolution before it.

    Returns:
        The network of integers that was written, in eval mode. It computes what the file defines.

    Raises:
        ValueError: the path has another suffix; the number of names is not that of the arguments, or these have
            different numbers of samples; nothing is quantized; the network is sharded; a forward was set on an
            instance, so that it would not follow the network into the file; clipping scalars of an activation are not
            static; codes are not integers; the network returns no tensors, or none with these names.
        ConfigError: packages that the format needs are not installed.
        OSError: the folder does not exist or is not writable, which is checked before any work; or the disk is full.
        RunError: PyTorch's exporter cannot export the network, or the network is too large for ONNX.
    """
    model, target = unwrapped(model), Path(path)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{path}: must end in one of {', '.join(SUFFIXES)}")
    check_target(target)
    dynamic = {t.name: t.quantizer for t in quantized_tensors(model) if t.tensor != "weight" and t.quantizer.dynamic}
    check_constant(dynamic)
    if dynamic:
        raise ValueError(
            f"{next(iter(dynamic))} has dynamic clipping scalars: call freeze(model, ...) to make them static"
        )
    given = (example,) if isinstance(example, Tensor) else tuple(example)
    given = tuple(t.float() if t.is_floating_point() else t for t in given)
    if target.suffix != ".safetensors":
        given = several_samples(given)
    names = inputs or (["input"] if len(given) == 1 else [f"input_{i}" for i in range(len(given))])
    if len(names) != len(given):
        raise ValueError(f"inputs={list(names)}: must be {len(given)} names, one for each tensor of example")
    for module in model.modules():
        refresh(module)  # tensors computed in a pass with gradients cannot be copied
    if is_sharded(model):
        raise ValueError("the network is sharded over processes: export one that `load` restores from its saved file")
    copied = copy.deepcopy(model).float()
    _check_forwards(copied)
    integers = to_integers(freeze(copied))
    with uncompiled():
        if fold:
            fold_batchnorm(integers, *given)
        signature = Signature(given, names, _names(integers(*given), outputs), longest)
    with uncompiled(), explaining_full_disk(target.parent):
        if target.suffix == ".onnx":
            write_onnx(integers, signature, target)
        elif target.suffix == ".pt2":
            write_program(integers, signature, target)
        else:
            write_safetensors(integers, target, {"inputs": signature.inputs, "outputs": signature.outputs})
    return integers


def _check_forwards(copied: nn.Module) -> None:
    """Raise an error if a forward that was set on an instance runs the network that was copied, instead of the copy.

    Raises:
        ValueError: there is one.
    """
    for name, module in copied.named_modules():
        forward = vars(module).get("forward")
        ours = forward is None or module in (getattr(forward, "__self__", None), *getattr(forward, "args", ()))
        if not ours:
            raise ValueError(
                f"{name or type(module).__name__} has a forward that was set on the instance, which would run the "
                f"original network: delete it before the export (del {'model.' if name else 'model'}{name}.forward)"
            )


def _names(result: Any, wanted: Sequence[str] | None) -> Sequence[str]:
    """Return the names of the outputs: those that are wanted, or otherwise of all tensors that the network returned."""
    values, by_name = fields_of(result), True
    if values is None:
        several = [result] if isinstance(result, Tensor) else list(result)
        by_name, values = False, {f"output_{i}" if len(several) > 1 else "output": t for i, t in enumerate(several)}
    tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
    fits = set(wanted or ()) <= set(tensors) if by_name else len(tensors) == len(values) == len(wanted or tensors)
    if not (tensors and fits):
        asked = "" if wanted is None else f", so outputs={list(wanted)} does not fit"
        raise ValueError(f"the network returns a {type(result).__name__} with tensors {', '.join(tensors)}{asked}")
    return tensors if wanted is None else wanted
