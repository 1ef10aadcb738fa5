"""The part `pictures` of benchmark.py: folders of JPEGs to normalized batches, ours against the reference loaders."""

import argparse
import importlib.util
import statistics
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
"""width and height: about the median of ImageNet's"""
COUNT, BATCH, SIDE = 64, 32, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Epoch = Callable[[], Iterator[Any]]


def pictures(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Processor time of this process alone, on one thread: of decoding, augmenting and normalizing for training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder))
            return _take_turns(_contest(Path(folder)), args.rounds)
    finally:
        torch.set_num_threads(threads)


def _write(folder: Path) -> None:
    """JPEGs of smooth colours with noise on them, 100 kB each, as ImageNet's."""
    random = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", 1)):
        (folder / split / "a").mkdir(parents=True)
        for i in range(count):
            smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE)
            noisy = np.asarray(smooth) + random.normal(0, 20, (*SIZE[::-1], 3))
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            picture.save(folder / split / "a" / f"{i}.jpg", quality=90)


def _contest(folder: Path) -> dict[str, Epoch]:
    contest = {f"ours, resizing={by}": _ours(folder, by) for by in ("pillow", "tensor")}
    usual = [v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    normalized = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    contest["torchvision"] = _reference(folder, v2.Compose([*usual, *normalized]))
    if importlib.util.find_spec("timm"):
        create = importlib.import_module("timm.data").create_transform
        options = {"color_jitter": 0, "interpolation": "bilinear", "mean": MEAN, "std": STD}
        made = create(SIDE, is_training=True, **options)
        contest["timm"] = _reference(folder, made)
    return contest


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
        low, middle, high = statistics.quantiles(values[1:], n=4)  # the first was to settle
        row = {"loader": name, "ms a picture": middle, "spread": high - low, "pictures/s a core": 1e3 / middle}
        ratios = [a / b for a, b in zip(values[1:], times["torchvision"][1:], strict=True)]
        rows.append(row | {"of torchvision": statistics.median(ratios)})
    return rows
