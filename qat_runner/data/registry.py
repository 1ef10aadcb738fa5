"""The data sets by name: where each must lie, and how it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qat_runner.config import DatasetConfig
from qat_runner.data.arrays import labelled, read_npz
from qat_runner.data.batches import WHOLE, Data, Shard
from qat_runner.data.folder import FolderSource
from qat_runner.data.imagenet import FIRST_CLASS, LAST_CLASS
from qat_runner.data.images import ImageData, Labelled, MemorySource, Source, shrink
from qat_runner.data.listing import class_folders, printable
from qat_runner.data.published import read_cifar10, read_fashion_mnist
from qat_runner.data.question_answering import load_squad
from qat_runner.data.squad import FILES, holds_squad
from qat_runner.errors import ConfigError

Arrays = tuple[NDArray[Any], NDArray[Any]]
"""pictures and labels"""

PREPARE = "python -m qat_runner.data.prepare"


def _digits(folder: Path, config: DatasetConfig) -> Source:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import, and only this data set needs it
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pictures = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return MemorySource((pictures[train], labels[train]), (pictures[val], labels[val]), config.augment)


def _cifar10(folder: Path, config: DatasetConfig) -> Source:
    if (folder / "cifar10.npz").is_file():
        x_train, y_train, x_test, y_test = read_npz(folder / "cifar10.npz", ("x_train", "y_train", "x_test", "y_test"))
        return _in_memory((x_train, y_train), (x_test, y_test), config)
    batches = folder / "cifar-10-batches-py"
    return _in_memory(read_cifar10(batches, train=True), read_cifar10(batches, train=False), config)


def _fashion_mnist(folder: Path, config: DatasetConfig) -> Source:
    raw = folder / "FashionMNIST" / "raw"
    return _in_memory(read_fashion_mnist(raw, train=True), read_fashion_mnist(raw, train=False), config)


def _in_memory(train: Arrays, test: Arrays, config: DatasetConfig) -> MemorySource:
    training, notes = labelled("train", *train)
    validation, more = labelled("test", *test)
    return MemorySource(training, validation, config.augment, (*notes, *more))


def _fake(folder: Path, config: DatasetConfig) -> Source:
    """Noise, brighter for higher classes: enough to see a loss fall."""
    classes, size = config.num_classes or 10, config.image_size
    generator = torch.Generator().manual_seed(0)

    def half(count: int) -> Labelled:
        labels = torch.randint(0, classes, (count,), generator=generator)
        pictures = torch.randint(0, 128, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        return pictures + (labels * 127 // classes).to(torch.uint8).view(-1, 1, 1, 1), labels

    return MemorySource(half(config.fake_pictures), half(max(config.fake_pictures // 4, 1)), config.augment)


def _class_folders(folder: Path, config: DatasetConfig) -> Source:
    return FolderSource(folder, config.image_size, config.workers, config.skip_corrupt)


def _imagenet(folder: Path, config: DatasetConfig) -> Source:
    source = FolderSource(folder, config.image_size, config.workers, config.skip_corrupt)
    ends = source.classes[0], source.classes[-1]
    if ends != (FIRST_CLASS, LAST_CLASS):
        raise ValueError(
            f"the first and last class folders are {ends[0]} and {ends[1]}, not {FIRST_CLASS} and {LAST_CLASS}; "
            f"dataset=imagefolder takes any"
        )
    return source


def _holds_cifar10(folder: Path) -> bool:
    return (folder / "cifar10.npz").is_file() or (folder / "cifar-10-batches-py").is_dir()


def _holds_fashion_mnist(folder: Path) -> bool:
    return (folder / "FashionMNIST" / "raw").is_dir()


def _holds_class_folders(folder: Path) -> bool:
    return all((folder / half).is_dir() and class_folders(folder / half) for half in ("train", "val"))


_FOLDERS = "train/ and val/ with a folder of pictures for each class"

PICTURES: dict[str, Callable[[Path, DatasetConfig], Source]] = {
    "digits": _digits,
    "fake": _fake,
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "imagenet": _imagenet,
    "imagefolder": _class_folders,
}
"""Name -> how pictures are read."""

DATASETS: dict[str, tuple[Callable[[Path], bool] | None, str]] = {
    "digits": (None, ""),
    "fake": (None, ""),
    "cifar10": (
        _holds_cifar10,
        f"cifar10.npz or torchvision's cifar-10-batches-py/ ('{PREPARE} cifar10 DATA_DIR' downloads it)",
    ),
    "fashion_mnist": (
        _holds_fashion_mnist,
        f"torchvision's FashionMNIST/raw/ ('{PREPARE} fashion_mnist DATA_DIR' downloads it)",
    ),
    "imagenet": (
        _holds_class_folders,
        f"{_FOLDERS} ('{PREPARE} imagenet DATA_DIR' makes them from the official tar files)",
    ),
    "imagefolder": (_holds_class_folders, _FOLDERS),
    "squad": (holds_squad, f"{' and '.join(FILES)} ('{PREPARE} squad DATA_DIR' downloads them)"),
}
"""Name -> (whether a folder holds it, or None where there is nothing to hold; what must lie there)."""


def _fit(source: MemorySource, config: DatasetConfig) -> MemorySource:
    """The source with pictures of the size that the config asks for."""
    has, wanted = source.training[0].shape[2], config.image_size
    if has % wanted:
        raise ConfigError(f"dataset.image_size={wanted}: must divide {has}, the pixels a side of {config.name}")
    classes = 1 + max(int(labels.max()) for _, labels in (source.training, source.validation))
    if config.num_classes is None or config.num_classes < classes:
        raise ConfigError(f"dataset.num_classes={config.num_classes}: {config.name} has {classes} classes")
    (train, train_labels), (val, val_labels) = source.training, source.validation
    return MemorySource(
        (shrink(train, wanted), train_labels), (shrink(val, wanted), val_labels), source.augmentation, source.notes
    )


def find_dataset(config: DatasetConfig, data_dir: str) -> Path:
    """The folder that holds a data set: data_dir itself or its subfolder of the data set's name.

    Raises:
        ConfigError: unknown name; a folder that cannot be read; it lies in neither, the message says what must lie
            where, and which command prepares it.
    """
    if config.name not in DATASETS:
        raise ConfigError(f"dataset.name={config.name}: must be one of {', '.join(DATASETS)}")
    holds, what = DATASETS[config.name]
    root = Path(data_dir).expanduser()
    try:
        for folder in (root, root / config.name):
            if holds is None or (folder.is_dir() and holds(folder)):
                return folder
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset={config.name}: data_dir={printable(data_dir)}: {error}") from error
    raise ConfigError(
        f"dataset={config.name}: not found in data_dir={data_dir}; there (or in {root / config.name}) must lie {what}"
    )


def load_dataset(
    config: DatasetConfig,
    data_dir: str,
    device: torch.device,
    seed: int,
    channels_last: bool = False,
    tokenizer: Any = None,
    shard: Shard = WHOLE,
) -> Data:
    """Read a data set.

    Args:
        config: which one, and how it is to be read.
        data_dir: where data sets lie.
        device: where batches are wanted.
        seed: of order and augmentation.
        channels_last: memory layout of pictures.
        tokenizer: of text.
        shard: of this process, where several share the work.

    Raises:
        ConfigError: it is not there, or is not what its config says.
    """
    folder = find_dataset(config, data_dir)
    try:
        if config.name == "squad":
            return load_squad(folder, config, tokenizer, device, seed, shard)
        source = PICTURES[config.name](folder, config)
    except Exception as error:  # whatever a parser may raise on files that are something else
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"dataset={config.name}: {printable(str(folder))} cannot be read ({told})") from error
    if isinstance(source, MemorySource):
        source = _fit(source, config)
    num_classes = len(source.classes) if isinstance(source, FolderSource) else config.num_classes
    if config.num_classes not in (None, num_classes):
        raise ConfigError(
            f"dataset.num_classes={config.num_classes}: {folder / 'train'} has {num_classes} class folders"
        )
    assert num_classes is not None
    normalization = tuple(config.mean), tuple(config.std)
    return ImageData(
        config.name, num_classes, config.image_size, source, *normalization, device, seed, channels_last, shard
    )
