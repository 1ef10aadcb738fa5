"""The user's cache folder: compiled kernels, tokenized texts, lists of images."""

import functools
import os
import tempfile
from pathlib import Path


def chosen_cache() -> Path:
    """Return $QAT_CACHE_DIR, or qat_runner in the user's cache folder, even if it is not writable."""
    base = os.environ.get("QAT_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qat_runner"
    return Path(base).expanduser()


def cache_folder() -> Path:
    """Return `chosen_cache` if it is writable, otherwise a temporary folder of this process."""
    folder = chosen_cache()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if os.access(existing, os.W_OK) else Path(_private().name)


@functools.cache
def _private() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="qat_runner-")
