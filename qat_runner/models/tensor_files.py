"""Named tensors in files, as training scripts leave them: of torch.save or safetensors, whole or in shards.

A file is somebody else's. Nothing but tensors and plain values is ever unpickled, an index leads to no other folder,
and what is odd about a file is said by a `TensorFileError`. What the tensors are worth is for `weights` to judge.
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
"""Of files of tensors, in any case."""

INDEX = ".index.json"
"""What the index of tensors in several files, shards, ends with."""

_SHARDS = (".safetensors", ".bin")

IN_FOLDER = (
    *("model.safetensors.index.json", "model.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""What stands for a folder, the first that is there."""

Parts = dict[str, dict[str, Tensor]]
"""The dicts of a file that hold tensors, by where they lie in it ("state_dict", "ema.model"; "" is the file itself)."""

_DEEPEST = 8  # dicts within dicts that are looked into
_LARGEST_INDEX = 2**26  # bytes
_RESAVE = """\
import torch; f = torch.load(OLD, map_location="cpu", weights_only=False); \
f = f if isinstance(f, dict) else {"model": f}; \
torch.save({k: getattr(v, "state_dict", lambda: v)() for k, v in f.items() \
if isinstance(v, (dict, torch.Tensor, torch.nn.Module))}, NEW)"""


class TensorFileError(Exception):
    """Why a path gives no tensors, to be said after its name."""


def find_file(path: Path) -> Path:
    """The file of tensors that a path means: itself, or what stands for a folder.

    Raises:
        TensorFileError: there is none, or its name has another suffix than files of tensors have.
    """
    if os.path.isdir(path):  # which, other than Path's, says no to a name that cannot be one
        found = [path / name for name in IN_FOLDER if os.path.isfile(path / name)]
        if not found:
            raise TensorFileError(f"is a folder that has none of {', '.join(IN_FOLDER)}; name a file")
        return found[0]
    if not os.path.isfile(path):
        raise TensorFileError("no such file")
    if not path.name.endswith(INDEX) and path.suffix.lower() not in SUFFIXES:
        raise TensorFileError(f"must end in {', '.join((*SUFFIXES, INDEX))}, or be a folder of such files")
    return path


def read_file(path: Path) -> Parts:
    """All named tensors that a path gives, on the CPU; those of torch.save are mapped into memory rather than read.

    Args:
        path: as `find_file` takes it.

    Raises:
        TensorFileError: it gives none, or cannot be read.
    """
    path = find_file(path)
    if path.name.endswith(INDEX):
        return {"": _read_shards(path)}
    content = _read(path)
    parts = _parts(content)
    if not parts:
        keys = f" (only {', '.join(map(shown, list(content)[:5]))})" if isinstance(content, Mapping) and content else ""
        raise TensorFileError(f"holds no named tensors{keys}")
    return parts


def dotted(*names: str) -> str:
    """Names within names as one; those that are empty are left out."""
    return ".".join(filter(None, names))


def shown(text: object) -> str:
    """A name out of a file, fit for a message: short, and without characters that cannot be printed."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)[:81])
    return line if len(line) <= 80 else f"{line[:77]}..."


def _read(path: Path) -> Any:
    """The content of one file."""
    try:
        return load_file(path) if path.suffix.lower() == ".safetensors" else _unpickle(path)
    except TensorFileError:
        raise
    except Exception as error:  # whatever a parser may raise on a file that is something else
        if foreign := _foreign(path, error):
            raise TensorFileError(foreign) from error
        text = str(error).rpartition("WeightsUnpickler error: ")[2]  # after advice to read it all the same
        reason = f"{type(error).__name__}: {text}".splitlines()[0].partition(". ")[0]
        raise TensorFileError(f"not a readable weights file ({shown(reason)})") from error


def _unpickle(path: Path) -> Any:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch.save has it since 2020
    if zipped:
        with zipfile.ZipFile(path) as archive:
            data = [entry for entry in archive.infolist() if "/data" in entry.filename]  # in TorchScript, there is more
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in data):
                raise TensorFileError("is a compressed archive, which torch.save does not write")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused anyway
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _foreign(path: Path, error: Exception) -> str | None:
    """What a pickle holds beyond tensors and plain values, and how its owner gets the tensors out of it."""
    found = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
    if not found:
        return None
    with suppress(Exception):  # an older format, of which the error names the first
        found = sorted(get_unsafe_globals_in_checkpoint(path)) or found
    names = ", ".join(map(shown, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    old, new = (json.dumps(text, ensure_ascii=False) for text in (str(path), f"{path}.tensors.pt"))
    line = shlex.join(["python", "-c", _RESAVE.replace("OLD", old).replace("NEW", new)])
    return (
        f"holds more than tensors and plain values: {names}; such a file can run code when it is read. If you trust "
        f"whoever wrote it, {line} saves its tensors alone"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, each from the file that it names for it."""
    shards = _shards(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        content = _parts(_read(index.parent / shard)).get("", {})
        for name in (name for name, of in shards.items() if of == shard):
            if name not in content:
                raise TensorFileError(f"says that {shown(shard)} holds {shown(name)}, which it does not")
            tensors[name] = content[name]
    return tensors


def _shards(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index."""
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("too large")
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TensorFileError(f"not a readable index ({shown(error)})") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise TensorFileError("not a readable index: its weight_map must name a file for each tensor")
    for shard in dict.fromkeys(shards.values()):
        if shard != Path(shard).name or Path(shard).suffix not in _SHARDS:
            raise TensorFileError(
                f"names {shown(shard)}, which must be a {' or '.join(_SHARDS)} file in the same folder"
            )
        if not os.path.isfile(index.parent / shard):
            raise TensorFileError(f"names {shown(shard)}, which is not there")
    return shards


def _parts(content: Any) -> Parts:
    """The dicts of tensors in what a file held; each is gone into once, so that one that holds itself does no harm."""
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
    """Whether this is a checkpoint of a run that `upgrade` has something to do with, and can."""
    state, model = (content.get(key) for key in ("state", "model")) if isinstance(content, dict) else (None, None)
    held = isinstance(state, dict) and state.get("held") is True
    return held and isinstance(model, dict) and all(isinstance(key, str) for key in model)
