"""1797 real handwritten digits of 8 x 8 pixels, included in scikit-learn."""

from pathlib import Path

import numpy as np
import torch

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset
from qat_runner.data.image_readers import image_reader
from qat_runner.data.images import MemorySource


def read(folder: Path, config: DatasetConfig) -> MemorySource:
    """Read both splits; the folder is ignored."""
    from sklearn.datasets import load_digits  # deferred: the import takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return MemorySource((images[train], labels[train]), (images[val], labels[val]), config.augment)


DATASET = Dataset("classification", image_reader(read))
