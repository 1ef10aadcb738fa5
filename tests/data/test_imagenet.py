"""Unpacking tar files like the official ones of ImageNet, with three classes."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision

from qat_runner.data import imagenet, prepare

WNIDS = ["n01440764", "n01443537", "n15075141"]
TRUTH = [3, 1, 1, 2]
IDS = {1: "n01443537", 2: "n15075141", 3: "n01440764"}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in reversed(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for i in range(2):
                    add(images, f"{wnid}_{i}.JPEG", f"{wnid} {i}".encode())
            add(tar, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in range(len(TRUTH), 0, -1):
            add(tar, f"ILSVRC2012_val_{i:08d}.JPEG", f"val {i}".encode())
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    records = [(n, wnid, f"words of {wnid}", 0) for n, wnid in IDS.items()] + [(4, "n00001740", "entity", 3)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(records, dtype=dtype)})
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "\n".join(map(str, TRUTH)).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in imagenet.MD5}
    monkeypatch.setattr(imagenet, "MD5", sums)
    monkeypatch.setattr(imagenet, "IMAGES", {"train": 6, "val": 4})
    monkeypatch.setattr(torchvision.models._meta, "_IMAGENET_CATEGORIES", ["words"] * 3)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.glob("*/*/*.JPEG")}


def test_class_folders(official: Path) -> None:
    assert prepare.main(["imagenet", str(official)]) == 0
    found = contents(official)
    assert len(found) == 10
    assert found["val/n01440764/ILSVRC2012_val_00000001.JPEG"] == "val 1"
    assert found["val/n15075141/ILSVRC2012_val_00000004.JPEG"] == "val 4"
    assert found["train/n01443537/n01443537_1.JPEG"] == "n01443537 1"


def test_goes_on_after_an_interruption(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tarfile.TarFile.extractall
    calls = 0

    def broken(self: tarfile.TarFile, *args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extractall", broken)
    with pytest.raises(KeyboardInterrupt):
        imagenet.prepare_imagenet(official)
    assert len(list((official / "train").iterdir())) == 1
    imagenet.prepare_imagenet(official)
    assert calls == 4  # the complete class is not unpacked again
    assert len(contents(official)) == 10
    assert not list(official.glob("*.part"))


def test_refusals(official: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with (official / "ILSVRC2012_img_val.tar").open("ab") as file:
        file.write(b"x")
    assert prepare.main(["imagenet", str(official)]) == 1
    assert "ILSVRC2012_img_val.tar is damaged: its MD5 sum is" in capsys.readouterr().err
    (official / "ILSVRC2012_img_train.tar").unlink()
    assert prepare.main(["imagenet", str(official)]) == 1
    assert "ILSVRC2012_img_train.tar is missing" in capsys.readouterr().err


def test_order() -> None:
    names = [name.split()[0] for name in torchvision.models._meta._IMAGENET_CATEGORIES]
    wnids = [f"n{i:08d}" for i in range(1000)]
    imagenet.check_order(wnids, dict(zip(wnids, names, strict=True)))
    with pytest.raises(ValueError, match="0 of 1000 class folders are where torchvision's weights expect them"):
        imagenet.check_order(wnids, dict(zip(wnids, reversed(names), strict=True)))
    with pytest.raises(ValueError, match="3 of 3 class folders"):
        imagenet.check_order(wnids[:3], dict(zip(wnids, names, strict=True)))
