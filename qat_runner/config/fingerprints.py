"""Fingerprints of the files that a config names, so that they count by what they hold, wherever they lie."""

import functools
import hashlib
import json
import os
from pathlib import Path

_CHECKPOINT_FILES = (".json", ".txt", ".safetensors", ".bin")


def path_of(value: str) -> Path:
    """The path that a key of a config means: ~ is the home folder."""
    return Path(os.path.expanduser(value))  # Path.expanduser fails on a user that there is not


def fingerprint(weights: str) -> str:
    """A fingerprint of a weights file, or of a folder of them or its index; the value itself where nothing is there."""
    path = path_of(weights)
    if not os.path.exists(path):
        return weights
    return _of(path.parent if path.name.endswith(".index.json") else path)


def _of(path: Path) -> str:
    if path.is_dir():
        parts = {file.name: _of(file) for file in sorted(path.iterdir()) if file.suffix in _CHECKPOINT_FILES}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if not os.path.isfile(path):
        return str(path)
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Of a file, read once for as long as it stays the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
