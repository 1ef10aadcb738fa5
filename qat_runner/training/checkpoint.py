"""Checkpoints: everything that a run needs to resume as if it had never stopped, including the random state.

A checkpoint is written by torch.save and then sealed: the zip archive gets a trailing comment with the SHA-256 of all
preceding bytes. A truncated or damaged file is therefore detected, and other tools can still read the archive.
"""

import hashlib
import inspect
import logging
import os
import random
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from qat_runner.errors import RunError, one_line
from qat_runner.insertion.state import upgrade
from qat_runner.runs.checkpoints import RandomState
from qat_runner.runs.files import explaining_full_disk
from qat_runner.runs.folder import LAST_CHECKPOINT

log = logging.getLogger("qat_runner")

LAST, PREVIOUS = LAST_CHECKPOINT, "previous.pt"
_MARK = b"qat_runner sha256="
_COMMENT = len(_MARK) + 64  # bytes
_WORDS = 624  # of a Mersenne Twister
_END = 22  # bytes of the last record of a zip archive without comment; its last two hold the length of the comment


def save(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write tensors and plain values atomically: path holds either the old or the new content, never a part of it.

    Args:
        path: file to write.
        content: tensors and plain values.
        keep: where to move the old content; None discards it.

    Raises:
        OSError: the file could not be written; the old content is unchanged, and no other file is left behind.
    """
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process, or a link
    try:
        with explaining_full_disk(path.parent), open(temporary, "x+b") as file:
            torch.save(content, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(f"{path}: {' '.join(str(error).split())}") from error
    if keep is not None and path.is_file():
        os.replace(path, keep)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _seal(file: BinaryIO) -> None:
    file.seek(-_END, os.SEEK_END)
    end = file.read(_END)
    assert end[:4] == b"PK\x05\x06" and end[-2:] == b"\0\0"
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _COMMENT))
    file.seek(0)
    digest = hashlib.sha256()
    while part := file.read(2**20):
        digest.update(part)
    file.write(_MARK + digest.hexdigest().encode())


def _sync_folder(folder: Path) -> None:
    """Sync a folder so that renames survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_whole(path: Path) -> bool:
    """Return whether a sealed file is complete and undamaged."""
    size = path.stat().st_size - _COMMENT
    if size < _END:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = size
        while left and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        return file.read() == _MARK + digest.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Load a file that `save` wrote, onto the CPU; only tensors and plain values are ever unpickled.

    Raises:
        RunError: the file is damaged.
    """
    reason = "it is damaged: its checksum is wrong"
    try:
        if is_whole(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kinds of tensors that are rejected anyway
                found = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, dict):
                raise ValueError("it is not a dictionary")
            return upgrade(found)
    except Exception as error:  # a parser may raise anything on damaged bytes
        reason = one_line(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    raise RunError(f"checkpoint {path} cannot be read ({reason})")


def exists(folder: Path) -> bool:
    """Return whether a checkpoint folder holds a checkpoint to resume from."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS))


def newest(folder: Path, take: Callable[[dict[str, Any]], object] = lambda found: None) -> dict[str, Any]:
    """Return the newest undamaged checkpoint in a folder that `take` accepts. Checkpoints passed over are logged.

    Args:
        folder: folder of checkpoints.
        take: called with a checkpoint; it raises RunError with the reason if the run cannot resume from it.

    Raises:
        RunError: no checkpoint can be used.
    """
    reasons: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = load(path)
        except RunError as error:
            reasons.append(str(error))
            continue
        try:
            take(found)
        except RunError as error:
            reasons.append(f"checkpoint {path} {error}")
            continue
        if reasons:
            log.warning(f"{reasons[0]}; resuming from the previous one")
        return found
    raise RunError(f"{'; '.join(reasons) or f'{folder} holds no checkpoint'}; overwrite=true restarts from scratch")


def random_state() -> RandomState:
    """Return the state of all global random generators, and of this process's GPU, as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *map(float, numpy_state[2:])],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: RandomState) -> None:
    """Restore the generators to a state returned by `random_state`.

    Raises:
        Exception: the state is invalid.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, position, has_gauss, gauss = state["numpy"]
    if keys.shape != (_WORDS,) or not 0 <= position <= _WORDS:  # NumPy would read out of bounds
        raise ValueError("random.numpy: is not a state of a Mersenne Twister")
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def check_model(saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check dtypes and layouts, which loading would silently convert; names and shapes are checked by loading itself.

    Raises:
        ValueError: a tensor has another dtype or layout; the message names it.
    """
    for name, own in model.state_dict().items():
        found = saved.get(name, own)
        if (found.dtype, found.layout) != (own.dtype, own.layout):
            raise ValueError(f"model.{name}: is {found.dtype}, {found.layout}, not {own.dtype}, {own.layout}")


def checked_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Check the saved state of an optimizer, which loading may accept although the next step would fail.

    Args:
        saved: "state", by index of the parameter, and "param_groups".
        optimizer: the optimizer that is to continue from the state.

    Returns:
        The saved state with the options of `optimizer`: the implementation depends on the current device, and the
        hyperparameters on the current config.

    Raises:
        ValueError: a key does not fit; the message names it.
    """
    groups, own_groups = saved["param_groups"], optimizer.state_dict()["param_groups"]
    if len(groups) != len(own_groups):
        raise ValueError(f"optimizer.param_groups: has {len(groups)} groups, not {len(own_groups)}")
    for i, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        if group["params"] != own["params"] or any(type(number) is not int for number in group["params"]):
            raise ValueError(f"optimizer.param_groups.{i}.params: must be the indices of the parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    template = _state_after_a_step(optimizer)
    for number, state in saved["state"].items():
        where = f"optimizer.state.{number}"
        if state and state.keys() != template.keys():
            raise ValueError(f"{where}: must have {', '.join(template) or 'nothing'}")
        for key, value in state.items():
            shape = parameters[number].shape if template[key].ndim else template[key].shape
            if not isinstance(value, Tensor) or value.shape != shape or value.dtype != template[key].dtype:
                raise ValueError(f"{where}.{key}: must be a tensor of shape {list(shape)}, {template[key].dtype}")
    return {**saved, "param_groups": own_groups}


def _state_after_a_step(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what such an optimizer stores per parameter, here for one of shape [1]; scalars have no dimension."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    options = inspect.signature(type(optimizer)).parameters  # AdamW sets a default of Adam that it does not accept
    lone = type(optimizer)([parameter], **{k: v for k, v in optimizer.defaults.items() if k in options})
    lone.step()
    return dict(lone.state[parameter])


def seed_everything(seed: int) -> None:
    """Seed all global random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
