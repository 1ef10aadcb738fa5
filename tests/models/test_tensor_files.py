"""Invalid and malicious files of tensors: each is rejected with an error of one sentence."""

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from qat_runner.config.fingerprints import fingerprint
from qat_runner.errors import ConfigError
from qat_runner.models import Source, load_weights
from qat_runner.models.tensor_files import SUFFIXES, shortened


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), linear=nn.Linear(4, 2)))


STATE = tiny().state_dict()
WEIGHTS = [name for name in STATE if "num_batches" not in name]


def load(path: Path, part: str | None = None) -> nn.Module:
    model = tiny()
    load_weights(model, Source(str(path), part), "tiny", new_head=False)
    return model


def refusal(path: Path) -> str:
    """Return the error message for a file that must be rejected, and check that the model is unchanged."""
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_weights(model, Source(str(path)), "tiny", new_head=False)
    message = str(caught.value)
    assert message.startswith(f"weights={path}: ") and "\n" not in message and message.isprintable()
    assert len(message) < 1200
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return message.removeprefix(f"weights={path}: ")


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int8": (lambda t: t.to(torch.int8), "is int8, not float32, float16, bfloat16, float64"),
    "int16": (lambda t: t.to(torch.int16), "is int16, not float32"),
    "int32": (lambda t: t.int(), "is int32, not float32"),
    "int64": (lambda t: t.long(), "is int64, not float32"),
    "uint8": (lambda t: t.to(torch.uint8), "is uint8, not float32"),
    "uint16": (lambda t: t.to(torch.uint16), "is uint16, not float32"),
    "bool": (lambda t: t.bool(), "is bool, not float32"),
    "complex64": (lambda t: t.to(torch.complex64), "is complex64, not float32"),
    "complex128": (lambda t: t.to(torch.complex128).conj(), "is complex128, not float32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn, not float32"),
    "sparse": (lambda t: t.to_sparse(), "is sparse_coo (float32), not dense"),
    "meta": (lambda t: t.to("meta"), "is on the meta device (float32), without values"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantized (qint8), not a plain"),
    "nested": (lambda t: torch.nested.nested_tensor([t.flatten()]), "is nested (float32), not a plain tensor"),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t.flatten()], layout=torch.jagged),
        "is a NestedTensor of float32",
    ),
    "NaN": (lambda t: torch.full_like(t, float("nan")), "has 12 of 12 elements that are NaN or infinite"),
    "infinity": (lambda t: torch.full_like(t, float("inf")), "has 12 of 12 elements that are NaN or infinite"),
    "too large": (
        lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
        "has 12 of 12 elements that are NaN or infinite",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, about deprecated or experimental kinds
@pytest.mark.parametrize("kind", SPOILT)
def test_tensors_that_are_none_to_compute_with(tmp_path: Path, kind: str) -> None:
    spoil, why = SPOILT[kind]
    state = {name: spoil(t) if t.is_floating_point() else t for name, t in STATE.items()}
    torch.save(state, tmp_path / "all.pt")
    message = refusal(tmp_path / "all.pt")
    assert message.startswith(f"tensor conv.weight {why}")
    assert message.endswith(f"; {len(WEIGHTS)} of {len(WEIGHTS)} tensors cannot be used")
    torch.save(STATE | {"bn.running_var": spoil(STATE["bn.running_var"])}, tmp_path / "one.pt")
    message = refusal(tmp_path / "one.pt")
    assert message.startswith("tensor bn.running_var ")
    assert message.endswith(f"; 1 of {len(WEIGHTS)} tensors cannot be used")


def test_elements_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in STATE.items()}
    state["conv.weight"].view(-1)[[1, 5]] = torch.tensor([float("nan"), float("-inf")])
    state["linear.bias"][0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt") == (
        "tensor conv.weight has 2 of 12 elements that are NaN or infinite; 2 of 8 tensors cannot be used"
    )


@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_spoilt_tensors_are_named_and_counted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kinds = data.draw(st.dictionaries(st.sampled_from(WEIGHTS), st.sampled_from(sorted(SPOILT)), min_size=1))
    path = tmp_path_factory.mktemp("spoilt") / "w.pt"
    torch.save({name: SPOILT[kinds[name]][0](t) if name in kinds else t for name, t in STATE.items()}, path)
    message = refusal(path)
    assert message.startswith(f"tensor {next(name for name in WEIGHTS if name in kinds)} ")
    assert message.endswith(f"; {len(kinds)} of {len(WEIGHTS)} tensors cannot be used")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/nonexistent/evil", "w"))


def cycle() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return content


def cycle_of_two() -> dict[str, Any]:
    one: dict[str, Any] = {}
    one["model"] = {"net": one, "module": {"state_dict": one}}
    return one


def deep(levels: int) -> dict[str, Any]:
    content: dict[str, Any] = dict(STATE)
    for _ in range(levels):
        content = {"state_dict": content}
    return content


def doubling(levels: int) -> dict[str, Any]:
    """Make nested dicts with 2^levels paths to the innermost dict."""
    content: dict[str, Any] = {}
    for _ in range(levels):
        content = {"model": content, "state_dict": content}
    return content


NO_TENSORS = "contains no named tensors"
CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a cycle": (cycle, f"{NO_TENSORS} (only state_dict)"),
    "a cycle of two": (cycle_of_two, NO_TENSORS),
    "500 dicts deep": (lambda: deep(500), NO_TENSORS),
    "doubling dicts": (lambda: doubling(60), NO_TENSORS),
    "a list": (lambda: [1, 2, 3], NO_TENSORS),
    "a list that holds itself": (lambda: (a := [1], a.append(a))[0], NO_TENSORS),
    "a tensor": (lambda: torch.ones(3), NO_TENSORS),
    "tensors by number": (lambda: dict(enumerate(STATE.values())), f"{NO_TENSORS} (only 0, 1, 2, 3, 4)"),
    "an empty dict": (dict, NO_TENSORS),
    "None": (lambda: None, NO_TENSORS),
    "names that cannot be printed": (lambda: {"\ud800\n\x1b[31m" * 99: 1}, f"{NO_TENSORS} (only ???[31m"),
    "strange names": (
        lambda: {"\n." * 999: torch.ones(1), "": torch.ones(1), ".": torch.ones(1)},
        "too few tensors match",
    ),
    "a name of many parts": (lambda: {"a." * 100_000 + name: t for name, t in STATE.items()} | {"b": 1}, ""),
    "another network": (
        lambda: {"x.weight": torch.ones(3)},
        "too few tensors match, 0 of the 8 tensors of tiny and of the 1",
    ),
    "another shape": (
        lambda: {**STATE, "conv.weight": torch.ones(4, 4), **{f"more.{i}": 1 for i in range(3)}},
        "too few tensors match, 7 of the 8 tensors",
    ),
    "a huge view": (
        lambda: {**STATE, "conv.weight": torch.ones(1).expand(10**9, 10**9)},
        "too few tensors match",
    ),
    "twice the same names": (
        lambda: {**STATE, **{f"module.{name}": t for name, t in STATE.items()}},
        "too few tensors match",
    ),
    "two networks": (
        lambda: {"a": STATE, "b": STATE},
        "a, b all match tiny; set weights_part=NAME to choose one",
    ),
    "a foreign object": (Evil, "contains more than tensors and plain values: io.open;"),
    "a foreign object beside": (lambda: {"model": STATE, "args": Evil()}, "values: io.open;"),
    "arguments": (lambda: {"model": STATE, "args": argparse.Namespace(lr=0.1)}, "values: argparse.Namespace;"),
    "a NumPy scalar": (lambda: {"model": STATE, "top1": np.float64(91.7)}, "numpy.dtype;"),
    "a NumPy array": (lambda: {"model": {name: t.numpy() for name, t in STATE.items()}}, "numpy.ndarray"),
    "a path": (lambda: {"model": STATE, "out": Path("x")}, "values: pathlib.PosixPath;"),
    "a whole module": (tiny, "values: torch.nn.modules.batchnorm.BatchNorm2d, torch.nn.modules.container.Sequential, "),
    "a module beside": (lambda: {"net": tiny(), "epoch": 3}, "values: torch.nn.modules.batchnorm.BatchNorm2d"),
    "a run's checkpoint, mangled": (
        lambda: {"state": {"held": torch.ones(3)}, "model": {3: 4}},
        "too few tensors match",
    ),
    "a run's checkpoint of old, mangled": (lambda: {"state": {"held": True}, "model": {3: 4}}, NO_TENSORS),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_are_no_weights(tmp_path: Path, name: str, legacy: bool) -> None:
    make, why = CONTENTS[name]
    if name == "500 dicts deep":
        sys.setrecursionlimit(20_000)  # for writing; reading is not recursive
    try:
        torch.save(make(), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    finally:
        sys.setrecursionlimit(1000)
    if not why:
        load(tmp_path / "w.pt")
    else:
        message = refusal(tmp_path / "w.pt")
        assert why in message or (legacy and "contains more than" in message)


def test_the_line_that_is_shown_saves_the_tensors(tmp_path: Path) -> None:
    """The command is for the owner of the file; here it runs on trusted files."""
    contents = {
        "arguments": {"model": STATE, "args": argparse.Namespace(lr=0.1)},
        "scalar": {"state_dict": STATE, "top1": np.float64(91.7)},
        'it\'s a "module"': tiny(),
        "beside": {"net": tiny(), "epoch": 3},
    }
    lines = []
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        line = re.search(
            "If you trust its source, python -c (.*) saves only its tensors$", refusal(tmp_path / f"{name}.pt")
        )
        assert line is not None
        lines.append(shlex.split(line[1])[0])
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in contents:
        load(tmp_path / f"{name}.pt.tensors.pt")


def whole_files() -> dict[str, bytes]:
    files = {".safetensors": save(STATE)}
    for suffix, zipped in ((".pt", True), (".th", False)):
        buffer = io.BytesIO()
        torch.save({"state_dict": STATE}, buffer, _use_new_zipfile_serialization=zipped)
        files[suffix] = buffer.getvalue()
    return files


WHOLE = whole_files()


@pytest.mark.parametrize(
    "cut", [b"ccollect", b"ccollections", b"ccollections\n", b"ccollections\nO", b"ccollections\nOrdered"]
)
def test_a_file_that_is_cut_off_in_the_name_of_a_class(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "w.th"
    path.write_bytes(WHOLE[".th"][: WHOLE[".th"].index(cut) + len(cut)])
    assert refusal(path).startswith("is not a readable weights file (")


@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_off(tmp_path_factory: pytest.TempPathFactory, suffix: str, at: float) -> None:
    path = tmp_path_factory.mktemp("cut") / f"w{suffix}"
    path.write_bytes(WHOLE[suffix][: int(len(WHOLE[suffix]) * at)])
    assert refusal(path).startswith("is not a readable weights file (")


@given(st.sampled_from(sorted(WHOLE)), st.binary(max_size=200), st.booleans())
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, begun: bool) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"w{suffix}"
    path.write_bytes(WHOLE[suffix][:40] * begun + content)
    assert refusal(path)


@given(
    st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_bytes_that_changed(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, changes: list[tuple[float, int]]
) -> None:
    """A changed byte in the numbers is loaded; anywhere else the file is rejected with one sentence."""
    path = tmp_path_factory.mktemp("changed") / f"w{suffix}"
    content = bytearray(WHOLE[suffix])
    for at, change in changes:
        content[min(int(at * len(content)), len(content) - 1)] ^= change
    path.write_bytes(content)
    with suppress(ConfigError):
        load(path)
        return
    refusal(path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # TorchScript's
def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    torch.save({"state_dict": {name: torch.zeros(500, 500) for name in STATE}}, tmp_path / "w.pt")
    for name, compression, change, why in (
        ("bomb", zipfile.ZIP_DEFLATED, lambda name, data: data, "is a compressed archive"),
        ("short", zipfile.ZIP_STORED, lambda name, data: data[:8] if "data/" in name else data, "not a readable"),
        ("empty", zipfile.ZIP_STORED, lambda name, data: b"", "not a readable weights file"),
        ("other", zipfile.ZIP_STORED, lambda name, data: data.replace(b"torch", b"porch"), "contains more than"),
    ):
        with (
            zipfile.ZipFile(tmp_path / "w.pt") as whole,
            zipfile.ZipFile(tmp_path / f"{name}.pt", "w", compression) as z,
        ):
            for entry in whole.infolist():
                z.writestr(entry.filename, change(entry.filename, whole.read(entry)))
        assert why in refusal(tmp_path / f"{name}.pt"), name
    (tmp_path / "holds.tar").mkdir()
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        tar.add(tmp_path / "w.pt", "storages")
    assert "not a readable weights file" in refusal(tmp_path / "old.tar")
    assert "is a folder that contains none of" in refusal(tmp_path / "holds.tar")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pth.tar", *map(str.upper, SUFFIXES)])
def test_suffixes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"epoch=3-step=400{suffix}"
    if suffix.lower() == ".safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path)
    assert torch.equal(load(path).get_parameter("conv.weight"), STATE["conv.weight"])


def sharded(folder: Path, suffix: str) -> Path:
    """Write STATE as two files with an index, in the format of transformers and accelerate; return the index."""
    names = list(STATE)
    shards = {f"model-0000{i + 1}-of-00002{suffix}": names[i::2] for i in range(2)}
    folder.mkdir(exist_ok=True)
    for shard, some in shards.items():
        (save_file if suffix == ".safetensors" else torch.save)({name: STATE[name] for name in some}, folder / shard)
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    index = folder / f"{stem}{suffix}.index.json"
    weight_map = {name: shard for shard, some in shards.items() for name in some}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    index = sharded(tmp_path / "w", suffix)
    for path in (index, index.parent):
        assert torch.equal(load(path).get_parameter("linear.bias"), STATE["linear.bias"])
    assert fingerprint(str(index)) == fingerprint(str(index.parent))
    shard = index.parent / f"model-00002-of-00002{suffix}"
    before = fingerprint(str(index))
    shard.rename(tmp_path / "elsewhere")
    assert f"lists {shard.name}, which does not exist" in refusal(index)
    shard.symlink_to(tmp_path / "elsewhere")  # as in the cache of the hub
    load(index)
    assert fingerprint(str(index)) == before
    shard.unlink()
    shard.write_bytes((index.parent / f"model-00001-of-00002{suffix}").read_bytes())
    assert f"lists conv.bias in {shard.name}, which does not contain it" in refusal(index)
    assert fingerprint(str(index)) != before
    shard.write_bytes(b"")
    assert "not a readable weights file" in refusal(index.parent)


def test_a_folder_of_one_file(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    load(tmp_path)


def names(shard: object) -> str:
    return json.dumps({"weight_map": {"conv.weight": shard}})


INDICES = {
    "empty": ("", "not a readable index ("),
    "no JSON": ("weights", "not a readable index ("),
    "nested": ("[" * 100_000, "not a readable index ("),
    "not UTF-8": (b"\xff\xfe{", "not a readable index ("),
    "a list": ("[]", "its weight_map must list a file for each tensor"),
    "no map": ("{}", "its weight_map must list"),
    "an empty map": ('{"weight_map": {}}', "its weight_map must list"),
    "a map of lists": (names([1]), "its weight_map must list"),
    "absent": (names("b.bin"), "lists b.bin, which does not exist"),
    "a folder": (names("folder.bin"), "lists folder.bin, which does not exist"),
    "upwards": (names("../a.bin"), "lists ../a.bin, which must be a .safetensors or .bin file in the same folder"),
    "upwards alone": (names(".."), "lists .., which must be"),
    "absolute": (names("/etc/passwd"), "lists /etc/passwd, which must be"),
    "below": (names("x/a.bin"), "lists x/a.bin, which must be"),
    "nothing": (names(""), "lists , which must be"),
    "no tensors": (names("w.bin.index.json"), "lists w.bin.index.json, which must be"),
    "NUL": (names("a\0.bin"), "lists a?.bin, which does not exist"),
    "long": (names("a" * 9999 + ".bin"), "which does not exist"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    content, why = INDICES[name]
    path = tmp_path / "w" / "w.bin.index.json"
    (tmp_path / "w" / "folder.bin").mkdir(parents=True)
    torch.save(STATE, tmp_path / "a.bin")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert why in refusal(path)


def test_an_index_of_absurd_size(tmp_path: Path) -> None:
    path = tmp_path / "w.bin.index.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse: only holes
    assert refusal(path) == "is not a readable index (too large)"


@given(st.text())
def test_what_is_shown_of_names(text: str) -> None:
    assert shortened(text).isprintable() and len(shortened(text)) <= 80
