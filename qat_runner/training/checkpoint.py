"""Checkpoints: all that a run needs to go on as if it had never stopped, and the random state with it.

A checkpoint is a file of torch.save, sealed: the zip archive that it is ends with a comment, the SHA-256 of all bytes
before. So a truncated or damaged file is known as such, and any other tool still reads it.
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

from qat_runner.errors import RunError, told
from qat_runner.insertion.state import upgrade
from qat_runner.runs.checkpoints import RandomState
from qat_runner.runs.files import full_disk_told

log = logging.getLogger("qat_runner")

LAST, PREVIOUS = "last.pt", "previous.pt"
_MARK = b"qat_runner sha256="
_COMMENT = len(_MARK) + 64  # bytes
_WORDS = 624  # of a Mersenne Twister
_END = 22  # bytes of a zip archive's last record without comment, whose last two say how long the comment is


def save(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write tensors and plain values so that path holds either the old content or the new one, never half of it.

    Args:
        path: where to.
        content: what.
        keep: where the old content goes; None: nowhere.

    Raises:
        OSError: it could not be written; the old content is as it was, and nothing else is left.
    """
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or a link
    try:
        with full_disk_told(path.parent), open(temporary, "x+b") as file:
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
    """Make renames last through a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_whole(path: Path) -> bool:
    """Whether a sealed file holds what was written."""
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
    """Read what `save` wrote, onto the CPU; nothing but tensors and plain values is ever unpickled.

    Raises:
        RunError: the file is damaged.
    """
    reason = "it is damaged: its checksum is wrong"
    try:
        if is_whole(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of kinds of tensors that are refused anyway
                found = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, dict):
                raise ValueError("it is no dictionary")
            return upgrade(found)
    except Exception as error:  # whatever a parser may raise on damaged bytes
        reason = told(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    raise RunError(f"checkpoint {path} cannot be read ({reason})")


def exists(folder: Path) -> bool:
    """Whether a folder of checkpoints holds one to go on from."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS))


def newest(folder: Path, take: Callable[[dict[str, Any]], object] = lambda found: None) -> dict[str, Any]:
    """The newest whole checkpoint of a folder that is taken; one that is damaged or not taken is named in the log.

    Args:
        folder: of checkpoints.
        take: is given a checkpoint, and raises RunError if it is none to go on from, with what to say of it.

    Raises:
        RunError: there is none.
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
            log.warning(f"{reasons[0]}; going on from the one before")
        return found
    raise RunError(f"{'; '.join(reasons) or f'{folder} holds no checkpoint'}; overwrite=true starts the run anew")


def random_state() -> RandomState:
    """The state of all global random generators, on a GPU that of this process's, as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *map(float, numpy_state[2:])],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: RandomState) -> None:
    """Undo what happened to the generators since `random_state`.

    Raises:
        Exception: it is no state of theirs.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, position, has_gauss, gauss = state["numpy"]
    if keys.shape != (_WORDS,) or not 0 <= position <= _WORDS:  # NumPy would read beyond the end of them
        raise ValueError("random.numpy: is no state of a Mersenne Twister")
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def check_model(saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse tensors that loading would quietly make into others; names and shapes it looks at itself.

    Raises:
        ValueError: naming the tensor.
    """
    for name, own in model.state_dict().items():
        found = saved.get(name, own)
        if (found.dtype, found.layout) != (own.dtype, own.layout):
            raise ValueError(f"model.{name}: is {found.dtype}, {found.layout}, not {own.dtype}, {own.layout}")


def checked_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, unless it is one that loading would take, and the next step trip over.

    Args:
        saved: its "state" by number of the parameter, and its "param_groups".
        optimizer: that is to go on with it.

    Returns:
        The same, with the options of the optimizer: how it computes is a matter of the device it goes on with, and what
        it computes of what the run is asked for.

    Raises:
        ValueError: naming the key.
    """
    groups, own_groups = saved["param_groups"], optimizer.state_dict()["param_groups"]
    if len(groups) != len(own_groups):
        raise ValueError(f"optimizer.param_groups: are {len(groups)}, not {len(own_groups)}")
    for i, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        if group["params"] != own["params"] or any(type(number) is not int for number in group["params"]):
            raise ValueError(f"optimizer.param_groups.{i}.params: are not the numbers of the parameters")
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
    """What such an optimizer keeps of a parameter: of one element here, so that what is a scalar has no dimension."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    options = inspect.signature(type(optimizer)).parameters  # AdamW sets a default of Adam's that it does not take
    lone = type(optimizer)([parameter], **{k: v for k, v in optimizer.defaults.items() if k in options})
    lone.step()
    return dict(lone.state[parameter])


def seed_everything(seed: int) -> None:
    """Seed all global random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
