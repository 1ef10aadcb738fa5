"""The part `images` of benchmark.py: JPEGs in every layout to normalized batches, ours against reference loaders."""

import argparse
import importlib.util
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qat_runner.data.folder import FolderSource
from qat_runner.data.images import ImageData

SIZE = 500, 375
"""width and height in pixels, about the median of ImageNet"""
COUNT, BATCH, SIDE = 64, 32, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Epoch = Callable[[], Iterator[Any]]


def images(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure the CPU time of this process, on one thread, for decoding, augmenting and normalizing training images."""
    threads, cache = torch.get_num_threads(), os.environ.get("QAT_CACHE_DIR")
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["QAT_CACHE_DIR"] = (
                f"{folder}/cache"  # parquet files are converted to shards there, before timing
            )
            _write(Path(folder))
            return _take_turns(_contest(Path(folder)), args.rounds)
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("QAT_CACHE_DIR")
        os.environ.update({"QAT_CACHE_DIR": cache} if cache else {})


def _write(folder: Path) -> None:
    """Write JPEGs of smooth colors with noise, 100 kB each like ImageNet's, in every layout."""
    random = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", 1)):
        jpegs = [_jpeg(random) for _ in range(count)]
        (folder / "folders" / split / "a").mkdir(parents=True)
        for i, jpeg in enumerate(jpegs):
            (folder / "folders" / split / "a" / f"{i}.jpg").write_bytes(jpeg)
        (folder / "tar").mkdir(exist_ok=True)
        with tarfile.open(folder / "tar" / f"{split}-0.tar", "w") as tar:
            for i, jpeg in enumerate(jpegs):
                for name, content in ((f"{i}.jpg", jpeg), (f"{i}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        if importlib.util.find_spec("pyarrow"):
            _write_parquet(folder / "parquet" / f"{split}-0.parquet", jpegs)


def _jpeg(random: np.random.Generator) -> bytes:
    smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE)
    noisy = np.asarray(smooth) + random.normal(0, 20, (*SIZE[::-1], 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_parquet(path: Path, jpegs: list[bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    rows = [{"image": {"bytes": jpeg, "path": f"{i}.jpg"}, "label": 0} for i, jpeg in enumerate(jpegs)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


def _contest(folder: Path) -> dict[str, Epoch]:
    folders = folder / "folders"
    contest = {f"ours, resizing={by}": _ours(folders, by) for by in ("pillow", "tensor")}
    contest |= {
        f"ours, {layout}": _ours(folder / layout, "pillow")
        for layout in ("tar", "parquet")
        if (folder / layout).is_dir()
    }
    usual = [v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    normalized = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    contest["torchvision"] = _reference(folders, v2.Compose([*usual, *normalized]))
    if importlib.util.find_spec("timm"):
        timm = importlib.import_module("timm.data")
        options = {"color_jitter": 0, "interpolation": "bilinear", "mean": MEAN, "std": STD}
        contest["timm, transforms like these"] = _reference(
            folders, timm.create_transform(SIDE, is_training=True, **options)
        )
        contest["timm, its own loader and defaults"] = _timm(folders, timm)
    return contest


def _timm(folder: Path, timm: Any) -> Epoch:
    """Use `create_loader` with its defaults, e.g. color jitter and a random resampling filter, but in this process."""
    made = timm.create_dataset("", root=folder, split="train", is_training=True)
    here = {"num_workers": 0, "persistent_workers": False, "device": torch.device("cpu")}
    loader = timm.create_loader(made, (3, SIDE, SIDE), BATCH, is_training=True, **here)
    return lambda: iter(loader)


def _ours(folder: Path, resizing: str) -> Epoch:
    source = FolderSource(folder, SIDE, 0, resizing=resizing)
    cpu = torch.device("cpu")
    data = ImageData("imagenet", 1, SIDE, source, MEAN, STD, cpu, seed=0, channels_last=True)
    return lambda: data.train_batches(BATCH, epoch=0)


def _reference(folder: Path, transform: Any) -> Epoch:
    loader: Any = DataLoader(ImageFolder(folder / "train", transform), BATCH, shuffle=True)
    return lambda: iter(loader)


def _take_turns(contest: dict[str, Epoch], rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in contest}
    for round in range(rounds + 1):
        for name, epoch in contest.items():
            torch.manual_seed(round)
            began = time.process_time()
            for _ in epoch():
                pass
            times[name].append(1e3 * (time.process_time() - began) / COUNT)
    rows = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values[1:], n=4)  # the first round is a warm-up
        row = {"loader": name, "ms per image": middle, "spread": high - low, "images/s per core": 1e3 / middle}
        ratios = [a / b for a, b in zip(values[1:], times["torchvision"][1:], strict=True)]
        rows.append(row | {"time / torchvision": statistics.median(ratios)})
    return rows
