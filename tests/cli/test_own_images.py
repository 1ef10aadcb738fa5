"""Runs on folders and arrays as users have them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qat_runner.cli.run import main
from qat_runner.data.splits import Decoded

SMALL = ["backend=eager", "model=resnet20", "epochs=1", "batch_size=4", "bits=32", "run_dir=run"]
FOLDERS = ["dataset=imagefolder", "data_dir=data", "dataset.image_size=8", "dataset.workers=0"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder data with two classes, one of which has a name that is not valid UTF-8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    for split in ("train", "val"):
        for name in (b"a", b"b\xff"):
            folder = tmp_path / "data" / split / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 9), (80 * i, 9, 9)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_images_that_were_left_out_are_recorded(data: Path) -> None:
    (data / "train" / ".ipynb_checkpoints").mkdir()
    os.mkfifo(data / "val" / "a" / "0.jpg")
    (data / "val" / "a" / "x\ny.jpg").write_bytes(b"no image")
    (data / "val" / os.fsdecode(b"b\xff") / "x.jpg").write_bytes(b"no image")
    assert main([*SMALL, *FOLDERS, "dataset.skip_corrupt=true"]) == 0
    log = (data.parent / "run" / "log.txt").read_text()
    assert "imagefolder: train/: skipped 1 hidden\n" in log
    assert "imagefolder: val/: skipped 1 that are neither files nor folders (the first is " in log
    assert r"image 'data/val/a/x\ny.jpg' cannot be decoded (not one of JPEG" in log
    assert r"image 'data/val/b\udcff/x.jpg' cannot be decoded (not one of JPEG" in log
    assert json.loads((data.parent / "run" / "summary.json").read_text())["corrupt_pictures"] == 2


def test_the_example_has_only_valid_images(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two images, which would be the first example, cannot be decoded."""
    sound, seen = Decoded.__getitem__, []

    def bad(self: Decoded, item: Any) -> Any:
        seen.append(item)
        image, label, trouble = sound(self, item)
        return image, label, "an image cannot be decoded" if len(seen) <= 2 else trouble

    monkeypatch.setattr(Decoded, "__getitem__", bad)
    assert main([*SMALL, *FOLDERS, "dataset.skip_corrupt=true"]) == 0
    assert json.loads((data.parent / "run" / "summary.json").read_text())["corrupt_pictures"] == 1


def test_an_invalid_image_ends_a_run_with_one_sentence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "val" / os.fsdecode(b"b\xff") / "x\ny.jpg").write_bytes(b"no image")
    assert main([*SMALL, *FOLDERS]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qat-run:")]
    assert r"image 'data/val/b\udcff/x\ny.jpg' cannot be decoded" in line
    assert line.endswith("set dataset.skip_corrupt=true to leave out such images")
    assert (data.parent / "run" / "error.txt").is_file()


@pytest.mark.parametrize("change", ["empty class", "other classes", "one-hot", "hidden classes alone"])
def test_errors_that_are_found_before_the_run_leave_nothing(
    data: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    asked = FOLDERS
    if change == "empty class":
        (data / "train" / "c").mkdir()
    elif change == "other classes":
        (data / "train" / "a").rename(data / "train" / "A")
    elif change == "one-hot":
        x, y = np.zeros((4, 32, 32, 3), np.uint8), np.eye(10)[:4]
        np.savez(data / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        asked = ["dataset=cifar10", "data_dir=data"]
    else:
        for folder in (data / "train").iterdir():
            folder.rename(folder.with_name(f".{folder.name}"))
    before = sorted(data.parent.rglob("*"))
    assert main([*SMALL, *asked]) == 2
    text = capsys.readouterr().err
    assert text.startswith("qat-run: dataset=") and text.count("\n") == 1
    assert sorted(data.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("dataset.resizing=tensor", "dataset.decode=gpu: needs a CUDA device, and device=cpu is the CPU"),
        ("dataset.resizing=pillow", "dataset.resizing=pillow: must be tensor with dataset.decode=gpu"),
    ],
)
def test_decoding_on_a_gpu_needs_one(data: Path, capsys: pytest.CaptureFixture[str], asked: str, text: str) -> None:
    assert main([*SMALL, *FOLDERS, "device=cpu", "dataset.decode=gpu", asked]) == 2
    assert capsys.readouterr().err.startswith(f"qat-run: {text}")
    assert not (data.parent / "run").exists()
