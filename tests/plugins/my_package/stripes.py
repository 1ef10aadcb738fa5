"""A data set for a built-in task: images of horizontal or vertical stripes."""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from qat_runner.config import DatasetConfig
from qat_runner.data import Dataset
from qat_runner.data.image_readers import image_reader, in_memory
from qat_runner.data.images import MemorySource

Array = NDArray[Any]


def read(folder: Path, config: DatasetConfig) -> MemorySource:
    """Generate the images; nothing is read."""

    def split(seed: int, count: int) -> tuple[Array, Array]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 2, (count,), generator=generator)
        lines = (torch.arange(8) % 2 * 200)[None, None, :, None].expand(count, 1, 8, 8)
        across = torch.where(labels[:, None, None, None] == 0, lines, lines.transpose(2, 3))
        noise = torch.randint(0, 50, across.shape, generator=generator)
        return (across + noise).to(torch.uint8).numpy(), labels.numpy()

    return in_memory(split(0, 256), split(1, 64), config)


DATASET = Dataset("classification", image_reader(read))
