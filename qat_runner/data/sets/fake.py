"""Noise images that are brighter for higher classes: enough to see a loss decrease."""

from pathlib import Path

import torch

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset
from qat_runner.data.image_readers import image_reader
from qat_runner.data.images import Labelled, MemorySource


def read(folder: Path, config: DatasetConfig) -> MemorySource:
    """Generate both splits; the folder is ignored."""
    classes, size = config.num_classes or 10, config.image_size
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Labelled:
        labels = torch.randint(0, classes, (count,), generator=generator)
        noise = torch.randint(0, 128, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        return noise + (labels * 127 // classes).to(torch.uint8).view(-1, 1, 1, 1), labels

    return MemorySource(split(config.fake_pictures), split(max(config.fake_pictures // 4, 1)), config.augment)


DATASET = Dataset("classification", image_reader(read))
