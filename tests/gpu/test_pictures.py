"""JPEGs decoded, and pictures resized, on the device that trains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat_runner.data.batches import WHOLE
from qat_runner.data.folder import FolderSource


def test_pictures_are_those_of_the_cpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same parts cut out, mirrored or not; a GPU's decoder rounds otherwise."""
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i, kind in enumerate(("RGB", "L", "CMYK", "RGB", "RGB")):
            smooth = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((120, 90 + i))
            smooth.convert(kind).save(tmp_path / split / "a" / f"{i}{'.png' if i == 3 else '.jpg'}", progressive=i == 4)
        (tmp_path / split / "a" / "damaged.jpg").write_bytes((tmp_path / split / "a" / "0.jpg").read_bytes()[:900])
    usual, on_device = (FolderSource(tmp_path, 32, 0, skip_corrupt=True, resizing="tensor") for _ in range(2))
    on_device.decode_on(device)
    for (pictures, labels), (same, kinds) in zip(
        *([*source.train(6, 3, 0, range(1), WHOLE), *source.val(6, range(1), WHOLE)] for source in (usual, on_device)),
        strict=True,
    ):
        difference = (pictures.float() - same.cpu().float()).abs()
        assert same.device.type == device.type and labels.equal(kinds.cpu())
        assert difference.max() == 0 if device.type == "cpu" else difference.mean() < 2
    assert usual.corrupt == on_device.corrupt and len(usual.corrupt) == 2
