"""Read named tensors from files that training scripts write: torch.save or safetensors, in one file or in shards.

Files are not trusted. Only tensors and plain values are ever unpickled, an index cannot refer to another folder, and
anything unusual about a file raises a `TensorFileError`. Whether the tensors are usable is checked by `weights`.
"""

import json
import os
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from qat_runner.insertion.state import upgrade

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".safetensors")
"""Suffixes of files of tensors, in upper or lower case."""

INDEX = ".index.json"
"""The ending of the file name of an index, which lists the tensors in several files (shards)."""

_SHARDS = (".safetensors", ".bin")

IN_FOLDER = (
    *("model.safetensors.index.json", "model.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""The files that are looked for in a folder; the first that exists is used."""

Parts = dict[str, dict[str, Tensor]]
"""The dicts of a file that contain tensors, by their place in it ("state_dict", "ema.model"; "" is the file itself)."""

_DEEPEST = 8  # levels of nested dicts that are searched
_LARGEST_INDEX = 2**26  # bytes
_RESAVE = """\
import torch; f = torch.load(OLD, map_location="cpu", weights_only=False); \
f = f if isinstance(f, dict) else {"model": f}; \
torch.save({k: getattr(v, "state_dict", lambda: v)() for k, v in f.items() \
if isinstance(v, (dict, torch.Tensor, torch.nn.Module))}, NEW)"""


class TensorFileError(Exception):
    """A path does not give tensors; the message gives the reason, and is shown after the name of the path."""


def find_file(path: Path) -> Path:
    """Return the file of tensors for a path: the path itself, or one of IN_FOLDER if it is a folder.

    Raises:
        TensorFileError: there is no such file, or its suffix is not one of SUFFIXES.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, it returns False for names that are invalid as a path
        found = [path / name for name in IN_FOLDER if os.path.isfile(path / name)]
        if not found:
            raise TensorFileError(f"is a folder that contains none of {', '.join(IN_FOLDER)}; give the path of a file")
        return found[0]
    if not os.path.isfile(path):
        raise TensorFileError("no such file")
    if not path.name.endswith(INDEX) and path.suffix.lower() not in SUFFIXES:
        raise TensorFileError(f"must end in {', '.join((*SUFFIXES, INDEX))}, or be a folder of such files")
    return path


def read_file(path: Path) -> Parts:
    """Read all named tensors of a path, on the CPU; files of torch.save are memory-mapped.

    Args:
        path: a file or a folder, as in `find_file`.

    Raises:
        TensorFileError: the path gives no tensors, or cannot be read.
    """
    path = find_file(path)
    if path.name.endswith(INDEX):
        return {"": _read_shards(path)}
    content = _read(path)
    parts = _parts(content)
    if not parts:
        keys = (
            f" (only {', '.join(map(shortened, list(content)[:5]))})"
            if isinstance(content, Mapping) and content
            else ""
        )
        raise TensorFileError(f"contains no named tensors{keys}")
    return parts


def dotted(*names: str) -> str:
    """Join nested names with dots; empty names are left out."""
    return ".".join(filter(None, names))


def shortened(text: object) -> str:
    """Return a text from a file in a form for messages: at most 80 characters, all of them printable."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)[:81])
    return line if len(line) <= 80 else f"{line[:77]}..."


def _read(path: Path) -> Any:
    """Return the content of one file."""
    try:
        return load_file(path) if path.suffix.lower() == ".safetensors" else _unpickle(path)
    except TensorFileError:
        raise
    except Exception as error:  # parsers may raise any exception on files of another kind
        if foreign := _foreign(path, error):
            raise TensorFileError(foreign) from error
        # drops torch's advice to load the file nevertheless
        text = str(error).rpartition("WeightsUnpickler error: ")[2]
        reason = f"{type(error).__name__}: {text}".splitlines()[0].partition(". ")[0]
        raise TensorFileError(f"is not a readable weights file ({shortened(reason)})") from error


def _unpickle(path: Path) -> Any:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # the format of torch.save since 2020
    if zipped:
        with zipfile.ZipFile(path) as archive:
            # TorchScript files have other entries, too
            data = [entry for entry in archive.infolist() if "/data" in entry.filename]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in data):
                raise TensorFileError("is a compressed archive, which torch.save does not write")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kinds of tensors that are rejected anyway
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _foreign(path: Path, error: Exception) -> str | None:
    """Describe what a pickle contains besides tensors and plain values, and how its owner can extract the tensors.

    Returns None if the error has another cause.
    """
    found = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
    if not found or _ends_within(path, found[0]):
        return None
    with suppress(Exception):  # in an older format, only the first one is known, from the error
        found = sorted(get_unsafe_globals_in_checkpoint(path)) or found
    names = ", ".join(map(shortened, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    old, new = (json.dumps(text, ensure_ascii=False) for text in (str(path), f"{path}.tensors.pt"))
    line = shlex.join(["python", "-c", _RESAVE.replace("OLD", old).replace("NEW", new)])
    return (
        f"contains more than tensors and plain values: {names}; such a file can run code when it is loaded. If you "
        f"trust its source, {line} saves only its tensors"
    )


def _ends_within(path: Path, name: str) -> bool:
    """Return whether a file ends in the middle of the name of this global, as a truncated one may.

    The unpickler takes what it reads for lines that end in a newline, and so reports the name without its last byte.
    """
    with open(path, "rb") as file:
        file.seek(-min(len(name) + 1, path.stat().st_size), os.SEEK_END)
        end = file.read()[:-1].replace(b"\n", b".")
    return end.rstrip(b".").endswith(name.rstrip(".").encode())


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read all tensors that an index lists, each from the file that the index gives for it."""
    shards = _shards(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        content = _parts(_read(index.parent / shard)).get("", {})
        for name in (name for name, of in shards.items() if of == shard):
            if name not in content:
                raise TensorFileError(f"lists {shortened(name)} in {shortened(shard)}, which does not contain it")
            tensors[name] = content[name]
    return tensors


def _shards(index: Path) -> dict[str, str]:
    """Read an index: a dict from the name of each tensor to the file beside the index that contains it."""
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("too large")
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TensorFileError(f"is not a readable index ({shortened(error)})") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise TensorFileError("is not a readable index: its weight_map must list a file for each tensor")
    for shard in dict.fromkeys(shards.values()):
        if shard != Path(shard).name or Path(shard).suffix not in _SHARDS:
            raise TensorFileError(
                f"lists {shortened(shard)}, which must be a {' or '.join(_SHARDS)} file in the same folder"
            )
        if not os.path.isfile(index.parent / shard):
            raise TensorFileError(f"lists {shortened(shard)}, which does not exist")
    return shards


def _parts(content: Any) -> Parts:
    """Find the dicts of tensors in the content of a file; each dict is searched once, so cycles do no harm."""
    if _is_old_checkpoint(content):
        content = upgrade(content)
    parts: Parts = {}
    seen: set[int] = set()
    level = [("", content)]
    for _ in range(_DEEPEST):
        dicts = [(path, d) for path, d in level if isinstance(d, Mapping)]
        level = []
        for path, some in dicts:
            named = {name: value for name, value in some.items() if isinstance(name, str)}
            if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
                parts[path] = tensors
            if id(some) not in seen:
                level += [(dotted(path, name), value) for name, value in named.items()]
            seen.add(id(some))
    return parts


def _is_old_checkpoint(content: Any) -> bool:
    """Return whether this is a checkpoint of a run in an old format that `upgrade` can convert."""
    state, model = (content.get(key) for key in ("state", "model")) if isinstance(content, dict) else (None, None)
    held = isinstance(state, dict) and state.get("held") is True
    return held and isinstance(model, dict) and all(isinstance(key, str) for key in model)
