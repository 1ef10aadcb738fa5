"""Fashion-MNIST, as unpacked by torchvision."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset
from qat_runner.data.image_readers import image_reader, in_memory
from qat_runner.data.images import MemorySource
from qat_runner.data.published import download, read_fashion_mnist

RAW = Path("FashionMNIST", "raw")


def read(folder: Path, config: DatasetConfig) -> MemorySource:
    """Read both splits.

    Raises:
        ValueError: the files are not those of Fashion-MNIST.
    """
    raw = folder / RAW
    return in_memory(read_fashion_mnist(raw, train=True), read_fashion_mnist(raw, train=False), config)


DATASET = Dataset(
    "classification",
    image_reader(read),
    holds=lambda folder: (folder / RAW).is_dir(),
    content=f"torchvision's {RAW}/",
    fetch=lambda folder: download("FashionMNIST", folder),
)
