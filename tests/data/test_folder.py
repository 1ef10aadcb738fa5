"""Batches of image folders: equality of all ways to decode and resize, and persistent workers."""

import multiprocessing
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat_runner.data.batches import WHOLE, Shard
from qat_runner.data.decoding import decode_image, decode_pixels
from qat_runner.data.folder import FolderSource
from qat_runner.errors import RunError

SIZES = [(500, 375), (375, 500), (140, 333), (64, 48), (300, 90)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of smooth colours with added noise, which are similar to photographs."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i, size in enumerate(SIZES):
            smooth = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
            noisy = np.asarray(smooth) + random.normal(0, 20, (*size[::-1], 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / split / "a" / f"{i}.jpg", quality=90)
    return root


def test_pixels_on_tensors_are_those_of_pillow_but_for_a_rounding(photographs: Path) -> None:
    sources = [FolderSource(photographs, 96, 0, resizing=by) for by in ("pillow", "tensor")]
    for epoch in range(3):
        (by_pillow, labels), (on_tensors, same) = (next(s.train(5, 0, epoch, range(1), WHOLE)) for s in sources)
        assert labels.equal(same)
        difference = (by_pillow.int() - on_tensors.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.1
    (by_pillow, _), (on_tensors, _) = (next(s.val(5, range(1), WHOLE)) for s in sources)
    difference = (by_pillow.int() - on_tensors.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.1


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_jpeg_is_read_as_pillow_reads_it(photographs: Path, tmp_path: Path, cut: float) -> None:
    content = (photographs / "train" / "a" / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(OSError, match=r".") as by_pillow:
        decode_image((tmp_path / "0.jpg").read_bytes())
    with pytest.raises(OSError, match=r".") as on_tensors:
        decode_pixels((tmp_path / "0.jpg").read_bytes())
    assert str(on_tensors.value) == str(by_pillow.value)


def test_workers_pass_over_what_their_group_is_told(photographs: Path) -> None:
    """Workers end on a signal of their parent, or when it ends, but not on a terminal's, cluster's or `timeout`'s."""
    source = FolderSource(photographs, 16, 2)
    expected = [y.tolist() for _, y in source.train(1, 7, 0, range(5), WHOLE)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for name in ("TERM", "INT", "USR1", "USR2"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [y.tolist() for _, y in source.train(1, 7, 0, range(5), WHOLE)] == expected
    assert multiprocessing.active_children() == workers
    workers[0].terminate()
    workers[0].join(10)
    assert workers[0].exitcode == 0


def test_workers_live_on_and_change_nothing(photographs: Path) -> None:
    """Interrupted epochs, epochs started in the middle, and two at a time give the batches of a single process."""
    alone, source = FolderSource(photographs, 16, 0), FolderSource(photographs, 16, 2)

    def batches(of: FolderSource, epoch: int, start: int = 0, end: int = 5) -> list[tuple[torch.Tensor, list[int]]]:
        return [(x, y.tolist()) for x, y in of.train(1, 7, epoch, range(start, end), WHOLE)]

    def check(epoch: int, start: int = 0, end: int = 5) -> None:
        for (x, y), (seen, label) in zip(
            batches(alone, epoch, start, end), batches(source, epoch, start, end), strict=True
        ):
            assert x.equal(seen) and y == label

    check(0)
    (workers,) = [source._splits["train"]._loader._iterator._workers]
    assert len(workers) <= 2
    under_way = source.train(1, 7, 1, range(5), WHOLE)
    first = next(under_way)
    check(2)  # while the other epoch is in progress
    rest = [x for x, _ in under_way]
    assert all(a.equal(b) for a, (b, _) in zip([first[0], *rest], batches(alone, 1), strict=True))
    cut_off = source.train(1, 7, 3, range(5), WHOLE)
    next(cut_off)
    del cut_off
    check(3, start=2)
    check(4, start=1, end=4)
    assert source._splits["train"]._loader._iterator._workers == workers
    assert all(worker.is_alive() for worker in workers)


def test_a_device_decodes_what_workers_do(photographs: Path, tmp_path: Path) -> None:
    """With the CPU as the device, pixels, random numbers and error messages equal those of dataset.decode=cpu."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for file in (photographs / split / "a").iterdir():
            shutil.copy(file, tmp_path / split / "a")
        Image.new("RGB", (50, 40), (9, 99, 200)).save(tmp_path / split / "a" / "6.png")
        turned = Image.Exif()
        turned[274] = 6
        Image.open(photographs / split / "a" / "0.jpg").save(tmp_path / split / "a" / "7.jpg", exif=turned)
        (tmp_path / split / "a" / "8.jpg").write_bytes((photographs / split / "a" / "0.jpg").read_bytes()[:5000])
        (tmp_path / split / "a" / "9.jpg").write_bytes(b"no image")
    sources = [FolderSource(tmp_path, 24, workers, skip_corrupt=True, resizing="tensor") for workers in (0, 0, 2)]
    for source in sources[1:]:
        source.decode_on(torch.device("cpu"))
    before = torch.get_rng_state()
    for usual, *others in zip(
        *([*s.train(4, 5, 1, range(2), Shard(1, 2)), *s.val(5, range(2), WHOLE)] for s in sources), strict=True
    ):
        for images, labels in others:
            assert images.equal(usual[0]) and labels.equal(usual[1])
    assert sources[0].corrupt == sources[1].corrupt == sources[2].corrupt and len(sources[0].corrupt) == 3
    assert torch.get_rng_state().equal(before)


def test_an_image_that_is_gone_and_a_device(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path, dirs_exist_ok=True)
    source = FolderSource(tmp_path, 24, 0, resizing="tensor")
    source.decode_on(torch.device("cpu"))
    (tmp_path / "val" / "a" / "1.jpg").unlink()
    with pytest.raises(
        RunError, match=r"a/1\.jpg cannot be decoded \(No such file or directory\); set dataset\.skip_corrupt"
    ):
        next(source.val(2, range(1), WHOLE))
