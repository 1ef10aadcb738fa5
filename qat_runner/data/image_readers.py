"""Turn a source of labelled images into `ImageData` with the image size and the classes of the config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qat_runner.config import DatasetConfig, Decode
from qat_runner.config.schema import Preprocessing
from qat_runner.data.arrays import labelled
from qat_runner.data.dataset import Delivery
from qat_runner.data.folder import FolderSource
from qat_runner.data.images import ImageData, MemorySource, Source, shrink
from qat_runner.data.layouts import find_layout
from qat_runner.data.listing import printable
from qat_runner.errors import ConfigError

Arrays = tuple[NDArray[Any], NDArray[Any]]
"""images and labels"""


def image_reader(
    source_in: Callable[[Path, DatasetConfig], Source],
) -> Callable[[Path, DatasetConfig, Delivery], ImageData]:
    """Make the `Dataset.read` function of an image data set from a function that reads its bytes.

    Args:
        source_in: reads a folder. Data sets without files ignore the folder.

    Returns:
        A function for `Dataset.read`. It raises ConfigError where image size or classes do not match the config, and
        where there is only one class.
    """

    def read(folder: Path, config: DatasetConfig, delivery: Delivery) -> ImageData:
        source = source_in(folder, config)
        if isinstance(source, MemorySource):
            source = _fit(source, config)
        if isinstance(source, FolderSource) and config.decode == Decode.gpu:
            source.decode_on(delivery.device)
        where = printable(str(folder))
        num_classes = len(source.classes) if isinstance(source, FolderSource) else config.num_classes
        if num_classes == 1:
            raise ConfigError(f"dataset={config.name}: {where} has images of one class only; two or more are needed")
        if config.num_classes not in (None, num_classes):
            raise ConfigError(
                f"dataset.num_classes={config.num_classes}: must be {num_classes}, the number of classes in {where}"
            )
        if num_classes is None:
            raise ConfigError(f"dataset.num_classes=null: must be set for dataset={config.name}")
        normalization = tuple(config.mean), tuple(config.std)
        return ImageData(
            config.name,
            num_classes,
            config.image_size,
            source,
            *normalization,
            device=delivery.device,
            seed=delivery.seed,
            channels_last=delivery.channels_last,
            interpolation=config.interpolation.value,
            shard=delivery.shard,
        )

    return read


def _fit(source: MemorySource, config: DatasetConfig) -> MemorySource:
    """Return the source with images of the size that the config asks for."""
    has, wanted = source.training[0].shape[2], config.image_size
    if wanted > has and config.preprocessing == Preprocessing.model:
        wanted = has  # ImageData enlarges the images, one batch at a time
    if has % wanted:
        raise ConfigError(
            f"dataset.image_size={wanted}: must divide {has}, the side length of the images of {config.name}"
        )
    classes = 1 + max(int(labels.max()) for _, labels in (source.training, source.validation))
    if config.num_classes is None or config.num_classes < classes:
        raise ConfigError(
            f"dataset.num_classes={config.num_classes}: must be at least {classes}, "
            f"the number of classes in {config.name}"
        )
    (train, train_labels), (val, val_labels) = source.training, source.validation
    return MemorySource(
        (shrink(train, wanted), train_labels), (shrink(val, wanted), val_labels), source.augmentation, source.notes
    )


def in_memory(train: Arrays, test: Arrays, config: DatasetConfig) -> MemorySource:
    """Make a source from the arrays of two splits, after checking them.

    Args:
        train: images and labels, in any format that `labelled` takes.
        test: images and labels of the validation split.
        config: sets the augmentation.

    Raises:
        ValueError: as `labelled` and `MemorySource`.
    """
    training, notes = labelled("train", *train)
    validation, more = labelled("test", *test)
    return MemorySource(training, validation, config.augment, (*notes, *more))


def in_folder(folder: Path, config: DatasetConfig) -> FolderSource:
    """Make a source from an image folder.

    Raises:
        ValueError: as `FolderSource`.
    """
    return FolderSource(
        folder,
        config.image_size,
        config.workers,
        config.skip_corrupt,
        config.resizing.value,
        config.interpolation.value,
        config.resize_size,
    )


def holds_images(folder: Path) -> bool:
    """Return whether a folder contains images in one of the layouts.

    Raises:
        ValueError: the folder has several layouts.
    """
    return find_layout(folder) is not None
