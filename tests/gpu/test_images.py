"""JPEGs are decoded and images are resized on the training device."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from qat_runner.data import decoding
from qat_runner.data.batches import WHOLE
from qat_runner.data.decoding import as_tensor, jpeg_pixels
from qat_runner.data.folder import FolderSource


def test_images_are_those_of_the_cpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crops and flips are the same; only the decoder of a GPU rounds differently."""
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
    for (images, labels), (same, kinds) in zip(
        *([*source.train(6, 3, 0, range(1), WHOLE), *source.val(6, range(1), WHOLE)] for source in (usual, on_device)),
        strict=True,
    ):
        difference = (images.float() - same.cpu().float()).abs()
        assert same.device.type == device.type and labels.equal(kinds.cpu())
        assert difference.max() == 0 if device.type == "cpu" else difference.mean() < 2
    assert usual.corrupt == on_device.corrupt and len(usual.corrupt) == 2


@pytest.mark.gpu
def test_what_a_step_still_writes_is_not_given_to_the_decoder(cuda: torch.device) -> None:
    jpegs = [jpeg() for _ in range(8)]
    jpeg_pixels(jpegs, cuda)
    torch.cuda.synchronize(cuda)
    expected = [pixels.cpu() for pixels in jpeg_pixels(jpegs, cuda)]
    for _ in range(5):
        freed = [torch.zeros_like(pixels, device=cuda) for pixels in expected]
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second, in place of a step that is still running
        for each in freed:
            each.fill_(7)
        del freed, each
        decoded = jpeg_pixels(jpegs, cuda)
        for pixels, same in zip(decoded, expected, strict=True):
            assert torch.equal(pixels.cpu(), same)


def test_what_decodes_is_waited_for_by_the_stream_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the stream operations, tested without a GPU."""
    asked: list[str] = []
    image, training = MagicMock(), MagicMock()
    image.record_stream.side_effect = lambda stream: asked.append("its memory is kept for training")
    training.wait_stream.side_effect = lambda stream: asked.append(f"training waits for {stream}")

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        asked.append(f"on {stream}")
        yield
        asked.append("back")

    def decode(*_: object, **__: object) -> list[MagicMock]:
        asked.append("decoded")
        return [image]

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(decoding, "_aside", lambda device: "its stream")
    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode)
    assert jpeg_pixels([jpeg()], torch.device("cuda", 0)) == [image]
    waiting = ["training waits for its stream", "its memory is kept for training"]
    assert asked == ["on its stream", "decoded", "back", *waiting]


def jpeg() -> torch.Tensor:
    """Return a smooth JPEG of 300x200 pixels."""
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200)).save(content, "JPEG")
    return as_tensor(content.getvalue())
