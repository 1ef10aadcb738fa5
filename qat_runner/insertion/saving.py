"""A quantized network in one file: its state, and the policy that it was quantized with."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_runner.insertion.insert import insert, policy_of, quantized_tensors, remember_elements, remove_quantizers
from qat_runner.policy import Policy

FORMAT = "qat_runner.network.1"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized network to a file, which `load` makes one of again.

    The file is a checkpoint of torch with plain values and tensors alone: policy, state dict, sizes of inputs.

    Args:
        model: with quantizers.
        path: of the file; one that is there is replaced, whole or not at all.

    Raises:
        ValueError: there are no quantizers in it.
        OSError: the file cannot be written.
    """
    tensors = quantized_tensors(model)
    if not tensors:
        raise ValueError(f"{type(model).__name__} holds no quantizers: torch.save(model.state_dict(), ...) does")
    content = {
        "format": FORMAT,
        "policy": policy_of(model).as_list(),
        "elements": {t.name: t.elements for t in tensors if t.tensor != "weight" and t.elements is not None},
        "state": model.state_dict(),
    }
    target = Path(path)
    beside = target.with_name(f"{target.name}.new")
    try:
        torch.save(content, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Quantize a network as a saved one was, and give it that one's state, in place.

    Args:
        path: a file that `save` wrote.
        model: the same network in full precision, built by the same code; its weights do not matter.

    Returns:
        The same model, with quantizers and state, on its device.

    Raises:
        ValueError: the file is none of `save`, or does not fit the model, which is left without quantizers then.
        OSError: it cannot be read.
    """
    content = _read(Path(path))
    insert(model, Policy.from_list(content["policy"]))
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:
        remove_quantizers(model)
        raise ValueError(f"{path}: does not fit {type(model).__name__} ({' '.join(str(error).split())})") from error
    remember_elements(model, content["elements"])
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file may hold
        raise ValueError(f"{path}: is no network that qat_runner saved (it cannot be read)") from error
    kinds = {"format": str, "policy": list, "elements": dict, "state": dict}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: is no network that qat_runner saved")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: its {key} is no {kind.__name__}")
    return content
