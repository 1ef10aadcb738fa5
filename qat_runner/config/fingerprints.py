"""Fingerprints of the files in a config, so that files are compared by content instead of by path."""

import functools
import hashlib
import json
import os
from pathlib import Path

_CHECKPOINT_FILES = (".json", ".txt", ".safetensors", ".bin")


def path_of(value: str) -> Path:
    """Return the value of a config key as a path, with ~ expanded to the home folder."""
    return Path(os.path.expanduser(value))  # Path.expanduser fails if the user does not exist


def fingerprint(weights: str) -> str:
    """Return the fingerprint of a weights file, of a folder of weights files, or of its index; if the path does not
    exist, the value itself."""
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
    """The SHA-256 of a file, which is read again only if its size or modification time has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
