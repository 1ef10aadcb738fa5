"""Export of your own network, trained in your own loop, as integers in a file: `qat.export`."""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.exporting.folding import fold_batchnorm
from qat_runner.exporting.formats import Signature, several_samples, write_onnx, write_program, write_safetensors
from qat_runner.exporting.integer import to_integers
from qat_runner.insertion import freeze, quantized_tensors
from qat_runner.insertion.calibrate import check_constant
from qat_runner.insertion.copying import not_called
from qat_runner.insertion.layers import refresh
from qat_runner.insertion.modes import explaining_argument_errors, inputs_of_batch, uncompiled
from qat_runner.insertion.saving import check_target
from qat_runner.insertion.wrappers import is_sharded, unwrapped
from qat_runner.runs.files import explaining_full_disk
from qat_runner.tasks import fields_of

SUFFIXES = (".onnx", ".pt2", ".safetensors")


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
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
        example: the arguments of forward, in order or by name, with the same number of samples in the first dimension
            of each tensor. The exported network takes any number of samples; all other sizes are fixed.
        inputs: names of the arguments in the file, in the order of forward; None: those of the example, if it has
            names; otherwise input, or input_0, input_1, ...
        outputs: names of what forward returns, or of the fields of its result that the file should return; None:
            output, or output_0, output_1, ..., or all fields that are tensors.
        longest: the largest size of the second dimension, such as the tokens of a text, which is then variable in all
            inputs that have one; None: it is fixed.
        fold: whether to fold BatchNorm into the step sizes of the convolution before it.

    Returns:
        The network of integers that was written, in eval mode. It computes what the file defines.

    Raises:
        ValueError: the path has another suffix; the number of names is not that of the arguments, or these have
            different numbers of samples, or are not all tensors; nothing is quantized; the network is sharded; a
            forward that was set on an instance would run the original in a copy; clipping scalars of an activation are
            not static, or were never found; codes are not integers; the network returns no tensors, or none with these
            names.
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
    given, names = _arguments(model, example)
    given = tuple(t.float() if t.is_floating_point() else t for t in given)
    if target.suffix != ".safetensors":
        given = several_samples(given)
    names = names if inputs is None else list(inputs)
    if len(names) != len(given):
        raise ValueError(f"inputs={names}: must be {len(given)} names, one for each tensor of example")
    for module in model.modules():
        refresh(module)  # tensors computed in a pass with gradients cannot be copied
    if is_sharded(model):
        raise ValueError("the network is sharded over processes: export one that `load` restores from its saved file")
    integers = to_integers(freeze(_without_wrappers(copy.deepcopy(model)).float()))
    with uncompiled(), not_called(model, by=integers):
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


def _without_wrappers(model: nn.Module) -> nn.Module:
    """Replace wrappers inside a network, such as compiled blocks, by the modules in them, in place; return it."""
    for module in [*model.modules()]:
        module._modules.update({name: unwrapped(m) for name, m in module._modules.items() if m is not None})
    return model


def _arguments(model: nn.Module, example: Any) -> tuple[tuple[Tensor, ...], list[str]]:
    """Return the arguments of forward in order, and the names of the inputs in the file.

    Raises:
        ValueError: they are not all tensors, or forward does not take those of a mapping in a row.
        TypeError: forward does not take them.
    """
    given = inputs_of_batch(model, example)
    names = ["input"] if len(given) == 1 else [f"input_{i}" for i in range(len(given))]
    if isinstance(given, dict):
        with explaining_argument_errors(model, given):
            bound = inspect.signature(model.forward).bind(**given)
        if bound.kwargs:
            raise ValueError(
                f"example: must be the first arguments of forward, since the inputs of a file have an order, but "
                f"{', '.join(bound.kwargs)} can be passed by name only, or an argument before it is missing"
            )
        names, given = list(bound.arguments), bound.args
    if others := [type(value).__name__ for value in given if not isinstance(value, Tensor)]:
        raise ValueError(f"example: must consist of tensors, not of {', '.join(others)}")
    return given, names


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
