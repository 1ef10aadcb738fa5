"""Arrays of images and labels in the formats that users save, and the files of published data sets."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10

from qat_runner.config import DatasetConfig
from qat_runner.data import Delivery, ImageData, load_dataset
from qat_runner.data.arrays import labelled
from qat_runner.data.images import MemorySource
from qat_runner.errors import ConfigError

CPU = torch.device("cpu")
X = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
Y = np.arange(20) % 10


def config(name: str = "cifar10", size: int = 8) -> DatasetConfig:
    return DatasetConfig(name=name, num_classes=10, image_size=size, mean=[0.0], std=[1.0])


def save(path: Path, x: Any = X, y: Any = Y, x_test: Any = None, y_test: Any = None) -> None:
    x_test, y_test = (x if x_test is None else x_test), (y if y_test is None else y_test)
    np.savez(path / "cifar10.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)


def load(path: Path, settings: DatasetConfig | None = None) -> MemorySource:
    data = load_dataset(settings or config(), str(path), Delivery(CPU, seed=0))
    assert isinstance(data, ImageData) and isinstance(data.source, MemorySource)
    return data.source


@given(
    size=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    layout=st.sampled_from(["last", "first", "none"]),
    pixel=st.sampled_from(["u1", "u2", "i4", "i8", ">i2", "f4", "f8", "scaled f2", "scaled f4", "scaled f8"]),
    label=st.sampled_from(["u1", "i1", "u2", ">i4", "i8", "u8", "f2", "f4", "f8"]),
    column=st.booleans(),
    order=st.sampled_from(["C", "F"]),
    seed=st.integers(0, 99),
)
def test_all_forms_say_the_same(
    size: int, channels: int, layout: str, pixel: str, label: str, column: bool, order: Any, seed: int
) -> None:
    assume(size not in (1, 3) or layout == "none")  # these shapes would be ambiguous
    assume(channels == 1 or layout != "none")
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (5, channels, size, size), dtype=np.uint8)
    x[0] = 255
    y = random.integers(0, 10, 5)
    form = {"last": x.transpose(0, 2, 3, 1), "first": x, "none": x[:, 0]}[layout]
    scaled, _, dtype = pixel.rpartition(" ")
    form = np.asarray(form / 255 if scaled else form, dtype=dtype, order=order)
    (images, labels), notes = labelled("train", form, (y[:, None] if column else y).astype(label))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous()
    np.testing.assert_array_equal(images.numpy(), x)
    np.testing.assert_array_equal(labels.numpy(), y)
    assert any("0..1" in note for note in notes) == bool(scaled)
    assert any("[N, C, H, W]" in note for note in notes) == (layout == "first")


ONE_HOT = np.eye(10, dtype=np.uint8)[Y]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "uneven": ({"y": Y[:7]}, "train has 20 images, but 7 labels"),
    "uneven in the other split": ({"y_test": Y[:7]}, "test has 20 images, but 7 labels"),
    "one-hot": ({"y": ONE_HOT}, r"labels of train: shape is \[20, 10\], probably one-hot; must be class indices \[N\]"),
    "one-hot floats": ({"y_test": ONE_HOT.astype("f4")}, r"labels of test: shape is \[20, 10\], probably one-hot"),
    "one label": ({"y": np.int64(3)}, r"labels of train: shape is \[\]; must be \[N\] or \[N, 1\]"),
    "labels of three axes": ({"y": Y[:, None, None]}, r"shape is \[20, 1, 1\]"),
    "labels from 1": ({"y": Y + 1}, r"num_classes=10: must be at least 11, the number of classes in cifar10"),
    "labels below 0": ({"y": Y - 1}, "labels of train: values contain -1; must be class indices from 0"),
    "labels beyond all": (
        {"y": Y.astype("u8") + np.uint64(2**63)},
        "labels of train: values contain 9223372036854775808",
    ),
    "labels with NaN": ({"y": np.where(Y == 3, np.nan, Y)}, "labels of train: values contain nan"),
    "infinite labels": ({"y": np.where(Y == 3, np.inf, Y)}, "labels of train: values contain inf"),
    "halves of labels": ({"y": Y / 2}, r"labels of train: values contain 0\.5"),
    "labels as text": ({"y": Y.astype(str)}, "labels of train: type is <U"),
    "labels as truth": ({"y": Y > 3}, "labels of train: type is bool"),
    "labels as objects": ({"y": Y.astype(object)}, "y_train contains Python objects; only numbers are loaded"),
    "images as objects": ({"x": np.array([X, None], dtype=object)[:1]}, "x_train contains Python objects"),
    "complex images": ({"x": X.astype("c8")}, "images of train: type is complex64"),
    "records": ({"x": np.zeros(20, dtype=[("a", "u1")])}, "images of train: type is"),
    "dates": ({"y": Y.astype("M8[s]")}, "labels of train: type is datetime64"),
    "flat images": ({"x": X.reshape(20, -1)}, r"images of train: shape is \[20, 192\]; must be \[N, H, H, C\]"),
    "no axes": ({"x": np.uint8(3)}, r"images of train: shape is \[\]"),
    "alpha": ({"x": np.zeros((20, 8, 8, 4), "u1")}, r"images of train: shape is \[20, 8, 8, 4\]"),
    "oblong": ({"x": X[:, :, :4]}, r"images of train: shape is \[20, 8, 4, 3\]"),
    "either layout": ({"x": np.zeros((20, 3, 3, 3), "u1")}, "which is ambiguous: the channels may be first or last"),
    "no images": ({"x": X[:0], "y": Y[:0]}, r"images of train: shape is \[0, 8, 8, 3\]; must not be empty"),
    "images of no size": ({"x": X[:, :0, :0]}, r"shape is \[20, 0, 0, 3\]; must not be empty"),
    "NaN": ({"x": np.full(X.shape, np.nan, "f4")}, "images of train: values contain NaN"),
    "infinity": ({"x": np.full(X.shape, np.inf, "f4")}, "images of train: values are float32 from inf to inf"),
    "floats of -1..1": (
        {"x": X / 127.5 - 1},
        "images of train: values are float64 from -1 to 1; must be whole numbers in 0..255 or",
    ),
    "normalized": ({"x_test": (X - 120.0) / 60}, "images of test: values are float64 from -2"),
    "odd floats": ({"x": X / 200}, r"images of train: values are float64 from 0 to 1\.275"),
    "16 bits": ({"x": X.astype("u2") * 257}, "images of train: values are uint16 from 0 to 65535"),
    "signed": ({"x": X.astype("i1")}, "images of train: values are int8 from -128 to 127"),
    "splits of other sizes": (
        {"x_test": np.zeros((20, 16, 16, 3), "u1")},
        r"train has images of \(8, 8\) pixels, val of \(16, 16\)",
    ),
    "a size that does not divide": ({"x": X[:, :7, :7], "x_test": X[:, :7, :7]}, "image_size=8: must divide 7"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays(tmp_path: Path, name: str) -> None:
    arrays, message = WRONG[name]
    save(tmp_path, **{"x_test": X, "y_test": Y} | arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def _npy(shape: Any, descr: str = "|u1", data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + data


def _archive(path: Path, **members: bytes) -> None:
    good = {}
    for name, array in {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y}.items():
        file = io.BytesIO()
        np.save(file, array)
        good[name] = file.getvalue()
    with zipfile.ZipFile(path / "cifar10.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (good | members).items():
            if content:
                archive.writestr(f"{name}.npy", content)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no archive": (lambda p: (p / "cifar10.npz").write_bytes(b"PK no archive"), "not a zip file"),
    "empty": (lambda p: (p / "cifar10.npz").touch(), "not a zip file"),
    "a pickle": (lambda p: (p / "cifar10.npz").write_bytes(pickle.dumps(_Evil())), "not a zip file"),
    "a pickle inside": (
        lambda p: _archive(p, y_train=_npy((1,), "|O", pickle.dumps(_Evil()))),
        "y_train contains Python objects",
    ),
    "a pickle for an array": (lambda p: _archive(p, y_train=pickle.dumps(_Evil())), "magic string"),
    "missing": (lambda p: _archive(p, y_train=b"", x_test=b"", other=b"x"), "lacks y_train, x_test; it contains "),
    "absurd shape": (lambda p: _archive(p, x_train=_npy((10**12, 8, 8, 3))), "should have 192000000000000 bytes"),
    "more than can be counted": (lambda p: _archive(p, x_train=_npy((2**62, 2**62))), "but has 0"),
    "negative shape": (lambda p: _archive(p, x_train=_npy((-1, -2), data=b"12")), r"shape \[-1, -2\]"),
    "cut": (lambda p: _archive(p, x_train=_npy(X.shape, data=b"123")), "should have 3840 bytes, but has 3"),
    "too long": (lambda p: _archive(p, y_train=_npy((2,), data=b"123")), "should have 2 bytes, but has 3"),
    "code for a shape": (lambda p: _archive(p, x_train=_npy("__import__('os')")), "cannot be read"),
    "a shape of text": (lambda p: _archive(p, x_train=_npy(("a", "b"))), "cannot be read"),
    "a long header": (lambda p: _archive(p, x_train=_npy((1,) * 9999)), "cannot be read"),
    "version 3": (lambda p: _archive(p, x_train=_npy((1,), version=b"\3\0")), r"version \(3, 0\)"),
    "damaged": (
        lambda p: (_archive(p), _spoil(p / "cifar10.npz", 200)),
        "cannot be read",
    ),
}


def _spoil(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where : where + 50] = b"\xff" * 50
    path.write_bytes(content)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[name]
    make(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "executed").exists()


def test_a_bomb_is_refused_by_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = _npy((10, 1024, 1024, 3), data=bytes(10 * 1024 * 1024 * 3))
    _archive(tmp_path, x_train=zeros)
    assert (tmp_path / "cifar10.npz").stat().st_size < 60_000
    sizes = {"SC_PHYS_PAGES": 10_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr("qat_runner.data.arrays._read", lambda *args: pytest.fail("was read"))
    with pytest.raises(ConfigError, match="more than half of this machine's memory"):
        load(tmp_path)


def test_what_was_taken_for_something_else_is_noted(tmp_path: Path) -> None:
    save(tmp_path, x=X.transpose(0, 3, 1, 2), x_test=(X / 255).astype("f4"), y_test=Y.astype("f4")[:, None])
    source = load(tmp_path)
    assert source.notes == (
        "train: images [20, 3, 8, 8] are interpreted as [N, C, H, W]",
        "test: float32 images are interpreted as 0..1",
    )
    assert torch.equal(source.training[0], source.validation[0])
    assert torch.equal(source.training[1], source.validation[1])
    save(tmp_path)
    assert load(tmp_path).notes == ()


def _python2(entry: dict[str, Any]) -> bytes:
    """Pickle a batch as in Python 2, where text and the content of an array are byte strings."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    numbers = b"".join(b"K" + bytes([label]) for label in entry["labels"])
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt"
        + text(b"b")
        + b"tR(I1\n"
        + b"(%s" % b"".join(b"I%d\n" % side for side in entry["data"].shape)
        + b"tcnumpy\ndtype\n("
        + text(b"u1")
        + b"I0\nI1\ntR(I3\n"
        + text(b"|")
        + b"NNNI-1\nI-1\nI0\ntbI00\n"
        + text(entry["data"].tobytes())
        + b"tb"
    )
    return b"(" + text(b"labels") + b"](" + numbers + b"e" + text(b"data") + array + b"d."


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes cifar-10-batches-py/ with given contents and makes them the official ones."""

    def write(*contents: bytes) -> Path:
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir(exist_ok=True)
        sums = []
        for number, content in enumerate(contents):
            (folder / f"batch{number}").write_bytes(content)
            sums.append([f"batch{number}", md5(content).hexdigest()])
        monkeypatch.setattr(CIFAR10, "train_list", sums[:-1])
        monkeypatch.setattr(CIFAR10, "test_list", sums[-1:])
        return folder

    return write


def test_cifar10_as_published(tmp_path: Path, batches: Callable[..., Path]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    entries = [{"data": rows[i : i + 2], "labels": [i, i + 1]} for i in (0, 2, 4)]
    folder = batches(_python2(entries[0]), pickle.dumps(entries[1]), _python2(entries[2]))
    source = load(tmp_path, config(size=32))
    np.testing.assert_array_equal(source.training[0].numpy(), rows[:4].reshape(4, 3, 32, 32))
    np.testing.assert_array_equal(source.validation[0].numpy(), rows[4:].reshape(2, 3, 32, 32))
    assert (source.training[1].tolist(), source.validation[1].tolist()) == ([0, 1, 2, 3], [4, 5])
    assert source.notes == ()
    (folder / "batch1").write_bytes(b"another")
    with pytest.raises(ConfigError, match="batch1 is not the official file: its MD5 sum differs"):
        load(tmp_path, config(size=32))
    (folder / "batch1").unlink()
    os.mkfifo(folder / "batch1")
    with pytest.raises(ConfigError, match="batch1 is missing"):
        load(tmp_path, config(size=32))


def test_a_pickle_cannot_run_anything(
    tmp_path: Path, batches: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("posix.system", "numpy.load", "numpy.testing.runstring", "builtins.eval"):
        module, _, function = name.rpartition(".")
        batches(f"c{module}\n{function}\n(S'touch executed'\ntR.".encode(), b"")
        with pytest.raises(ConfigError, match=f"the pickle names {name}, which is not allowed in a data set"):
            load(tmp_path, config(size=32))
    batches(pickle.dumps(_Evil()), b"")
    with pytest.raises(ConfigError, match="system, which is not allowed in a data set"):
        load(tmp_path, config(size=32))
    assert not (tmp_path / "executed").exists()


def _idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    head = struct.pack(f">{1 + array.ndim}i", magic or 2048 + array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


IDX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda raw: (raw / "t10k-labels-idx1-ubyte").unlink(), r"t10k-labels-idx1-ubyte is missing\)"),
    "packed": (
        lambda raw: (raw / "train-images-idx3-ubyte").rename(raw / "train-images-idx3-ubyte.gz"),
        r"train-images-idx3-ubyte is missing \(unpack train-images-idx3-ubyte\.gz\)",
    ),
    "empty": (
        lambda raw: (raw / "train-labels-idx1-ubyte").write_bytes(b""),
        "train-labels-idx1-ubyte is not an IDX file",
    ),
    "text": (lambda raw: (raw / "train-labels-idx1-ubyte").write_bytes(b"<html>"), "is not an IDX file of bytes"),
    "cut": (lambda raw: _spoil_end(raw / "train-images-idx3-ubyte"), "train-images-idx3-ubyte is not an IDX file"),
    "swapped": (lambda raw: _idx(raw / "train-images-idx3-ubyte", np.zeros(6, "u1")), "is not an IDX file of bytes"),
    "uneven": (
        lambda raw: _idx(raw / "train-labels-idx1-ubyte", np.zeros(5, "u1")),
        "6 images, but 5 labels",
    ),
    "labels beyond": (
        lambda raw: _idx(raw / "t10k-labels-idx1-ubyte", np.full(6, 10, "u1")),
        "num_classes=10: must be at least 11, the number of classes in fashion_mnist",
    ),
    "integers": (
        lambda raw: _idx(raw / "train-labels-idx1-ubyte", np.zeros(6, ">i4"), 0x0C01),
        "is not an IDX file of bytes",
    ),
}


def _spoil_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", IDX)
def test_wrong_idx_files(tmp_path: Path, name: str) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        _idx(raw / f"{split}-images-idx3-ubyte", np.zeros((6, 28, 28), "u1"))
        _idx(raw / f"{split}-labels-idx1-ubyte", np.arange(6, dtype="u1"))
    settings = config("fashion_mnist", 28)
    assert load(tmp_path, settings).train_size == 6
    change, message = IDX[name]
    change(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, settings)
    assert "\n" not in str(caught.value)
