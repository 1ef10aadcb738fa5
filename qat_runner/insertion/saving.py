"""Save a quantized network in one file: its state, and the policy that it was quantized with."""

import errno
import os
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qat_runner.insertion.insert import (
    check_no_quantizers,
    contracted_by,
    insert,
    network_of,
    outside,
    policy_of,
    products_of,
    quantized_tensors,
    remember_seen,
    remove_quantizers,
)
from qat_runner.insertion.products import Product
from qat_runner.insertion.tensors import whole
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.policy import Policy

FORMAT = "qat_runner.network.1"

_END = "_quantizer.grid"
"""End of a key in the state dict that every quantizer has."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized network to a file, from which `load` restores it.

    The file is a torch checkpoint that holds only plain values and tensors: policy, state dict, sizes of inputs,
    products. If a network is sharded over several processes, all of them must call this, and the first one writes.

    Args:
        model: with quantizers; of a wrapper, such as DistributedDataParallel, the network inside is saved.
        path: of the file; an existing file is replaced, completely or not at all.

    Raises:
        ValueError: there are no quantizers, or only parts of the network were quantized, each by itself.
        OSError: the file cannot be written.
    """
    model = unwrapped(model)
    if left := outside(model):
        raise ValueError(
            f"{left} does not belong to the part that was quantized: save the parts separately, or quantize the whole "
            f"network, with rules for what is to stay in full precision"
        )
    model = network_of(model)
    tensors = quantized_tensors(model)
    if not tensors:
        raise ValueError(f"{type(model).__name__} has no quantizers: use torch.save(model.state_dict(), ...) instead")
    state = model.state_dict()
    put_together = {key: full for key, value in state.items() if (full := whole(value)) is not value}
    state.update(put_together)
    if put_together and dist.get_rank() > 0:
        return
    target = Path(path)
    check_target(target)
    content = {
        "format": FORMAT,
        "policy": policy_of(model).as_list(),
        "elements": {t.name: t.elements for t in tensors if t.tensor != "weight" and t.elements is not None},
        "features": {t.name: t.quantizer.features for t in tensors if t.quantizer.features is not None},
        "contracted": contracted_by(model),
        "products": [astuple(p) for p in products_of(model)],
        "state": state,
    }
    beside = target.with_name(f"{target.name}.new")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
        beside.replace(target)
    except RuntimeError as error:  # raised by torch if it cannot close the archive
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        beside.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Raise an error if a file cannot be written at this path, or if the path is a folder.

    Raises:
        OSError: of the system's kind and with its message, naming the folder.
    """
    folder = path.parent
    if not folder.is_dir():
        reason, where = errno.ENOTDIR if folder.exists() else errno.ENOENT, folder
    elif path.is_dir():
        reason, where = errno.EISDIR, path
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason, where = errno.EACCES, folder
    else:
        return
    raise OSError(reason, os.strerror(reason), str(where))


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Quantize a network in place as a saved one was, and load the saved state into it.

    Args:
        path: a file that `save` wrote.
        model: the same network in full precision, built by the same code, or a wrapper around it, as in
            `quantize_model`; the values of its weights do not matter.

    Returns:
        The same model, with quantizers and state, on its device.

    Raises:
        ValueError: the file was not written by `save`, or does not fit the model, which is left without quantizers
            then.
        OSError: the file cannot be read.
    """
    content = _read(Path(path))
    products = _products(path, content.get("products", []))
    contracted = _contracted(path, content.get("contracted", {}))
    features = _features(path, content.get("features", {}))
    policy, tensors = Policy.from_list(content["policy"]), tensors_in(content["state"])
    check_no_quantizers(model)
    network = unwrapped(model)
    try:
        insert(network, policy, tensors=tensors, contracted=contracted)
        network.load_state_dict(content["state"])
    except (ValueError, RuntimeError) as error:
        remove_quantizers(network)
        raise ValueError(f"{path}: does not fit {type(network).__name__} ({' '.join(str(error).split())})") from error
    remember_seen(network, content["elements"], features, products)
    return model


def tensors_in(state: Mapping[str, Any]) -> set[str]:
    """Return the names of the tensors for which a network's state dict has quantizers."""
    names = {key.removesuffix(_END) for key in state if isinstance(key, str) and key.endswith(_END)}
    return {name if "." in name else f".{name}" for name in names}  # without a dot: the network is a single layer


def _products(path: str | os.PathLike[str], said: object) -> list[Product]:
    """Return the recorded products of a saved network; older files have none."""
    kinds = tuple(type(value) for value in astuple(Product("", "", "", 0)))
    rows: list[Any] = said if isinstance(said, list) else [said]
    if not all(isinstance(row, tuple | list) and tuple(map(type, row)) == kinds for row in rows):
        raise ValueError(
            f"{path}: products must be a list of rows with {', '.join(field.name for field in fields(Product))}"
        )
    return [Product(*row) for row in rows]


def _contracted(path: str | os.PathLike[str], said: object) -> dict[str, int]:
    """Return the parameters that modules which own them multiply by (see `contracted_by`); older files have none."""
    if not isinstance(said, dict) or not all(isinstance(name, str) and dim in (-1, -2) for name, dim in said.items()):
        raise ValueError(f"{path}: contracted must be a dict of names to -1 or -2")
    return said


def _features(path: str | os.PathLike[str], said: object) -> dict[str, int]:
    """Return the elements per sample of tensors whose quantizers need to know it; older files have none."""
    if not isinstance(said, dict) or not all(type(count) is int and count > 0 for count in said.values()):
        raise ValueError(f"{path}: features must be a dict of names to integers above 0")
    return said


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # an arbitrary file may raise anything
        raise ValueError(f"{path}: is not a network saved by qat_runner (it cannot be read)") from error
    kinds = {"format": str, "policy": list, "elements": dict, "state": dict}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a network saved by qat_runner")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: {key} must be a {kind.__name__}")
    return content
