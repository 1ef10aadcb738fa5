"""CIFAR-10, from cifar10.npz or as unpacked by torchvision."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.arrays import read_npz
from qat_runner.data.dataset import Dataset
from qat_runner.data.image_readers import image_reader, in_memory
from qat_runner.data.images import MemorySource
from qat_runner.data.published import download, read_cifar10

NPZ, BATCHES = "cifar10.npz", "cifar-10-batches-py"


def read(folder: Path, config: DatasetConfig) -> MemorySource:
    """Read both splits.

    Raises:
        ValueError: the files are not those of CIFAR-10.
    """
    if (folder / NPZ).is_file():
        x_train, y_train, x_test, y_test = read_npz(folder / NPZ, ("x_train", "y_train", "x_test", "y_test"))
        return in_memory((x_train, y_train), (x_test, y_test), config)
    batches = folder / BATCHES
    return in_memory(read_cifar10(batches, train=True), read_cifar10(batches, train=False), config)


DATASET = Dataset(
    "classification",
    image_reader(read),
    holds=lambda folder: (folder / NPZ).is_file() or (folder / BATCHES).is_dir(),
    content=f"{NPZ} or torchvision's {BATCHES}/",
    fetch=lambda folder: download("CIFAR10", folder),
)
