"""Checkpoints: all that a run needs to go on as if it had never stopped, and the random state with it.

A checkpoint is a file of torch.save, sealed: the zip archive that it is ends with a comment, the SHA-256 of all bytes
before. So a truncated or damaged file is known as such, and any other tool still reads it.
"""

import hashlib
import logging
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from qat_runner.errors import RunError
from qat_runner.insertion.state import upgrade
from qat_runner.training.files import full_disk_told, told
from qat_runner.training.records import RandomState

log = logging.getLogger("qat_runner")

LAST, PREVIOUS = "last.pt", "previous.pt"
_MARK = b"qat_runner sha256="
_COMMENT = len(_MARK) + 64  # bytes
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
    """Undo what happened to the generators since `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_everything(seed: int) -> None:
    """Seed all global random generators, and ask for repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
