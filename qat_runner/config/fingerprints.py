"""Fingerprints of the files that a config names, so that they count by what they hold, wherever they lie."""

import functools
import hashlib
import json
from pathlib import Path

_CHECKPOINT_FILES = (".json", ".txt", ".safetensors", ".bin")


def fingerprint(weights: str) -> str:
    """A fingerprint of a weights file, or of a checkpoint's folder; its name where there is no such thing."""
    path = Path(weights).expanduser()
    if path.is_dir():
        parts = {
            file.name: fingerprint(str(file)) for file in sorted(path.iterdir()) if file.suffix in _CHECKPOINT_FILES
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if not path.is_file():
        return weights
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Of a file, read once for as long as it stays the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
