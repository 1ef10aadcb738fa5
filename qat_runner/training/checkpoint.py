"""Checkpoints: all that a run needs to go on as if it had never stopped, and the random state with it."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat_runner.errors import RunError


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values so that path holds either the old content or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; nothing but tensors and plain values is ever unpickled.

    Raises:
        RunError: the file is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a parser may raise on damaged bytes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(f"checkpoint {path} cannot be read ({reason}); overwrite=true starts the run anew") from error
    return content


def random_state() -> dict[str, Any]:
    """The state of all global random generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *map(float, numpy_state[2:])],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what happened to the generators since `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
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
