"""From a source of labelled pictures to `ImageData` of the size and the classes that the config asks for."""

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
from qat_runner.errors import ConfigError

Arrays = tuple[NDArray[Any], NDArray[Any]]
"""pictures and labels"""


def pictures(
    source_in: Callable[[Path, DatasetConfig], Source],
) -> Callable[[Path, DatasetConfig, Delivery], ImageData]:
    """How a data set of pictures is read, given where its bytes come from.

    Args:
        source_in: reads a folder; for a set with nothing on the disk the folder means nothing.

    Returns:
        What `Dataset.read` is. It raises ConfigError where size or classes are not what the config says.
    """

    def read(folder: Path, config: DatasetConfig, delivery: Delivery) -> ImageData:
        source = source_in(folder, config)
        if isinstance(source, MemorySource):
            source = _fit(source, config)
        if isinstance(source, FolderSource) and config.decode == Decode.gpu:
            source.decode_on(delivery.device)
        num_classes = len(source.classes) if isinstance(source, FolderSource) else config.num_classes
        if config.num_classes not in (None, num_classes):
            raise ConfigError(f"dataset.num_classes={config.num_classes}: {folder} has {num_classes} classes")
        if num_classes is None:
            raise ConfigError(f"dataset.num_classes=null: must be given for dataset={config.name}")
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
    """The source with pictures of the size that the config asks for."""
    has, wanted = source.training[0].shape[2], config.image_size
    if wanted > has and config.preprocessing == Preprocessing.model:
        wanted = has  # a batch at a time is enlarged
    if has % wanted:
        raise ConfigError(f"dataset.image_size={wanted}: must divide {has}, the pixels a side of {config.name}")
    classes = 1 + max(int(labels.max()) for _, labels in (source.training, source.validation))
    if config.num_classes is None or config.num_classes < classes:
        raise ConfigError(f"dataset.num_classes={config.num_classes}: {config.name} has {classes} classes")
    (train, train_labels), (val, val_labels) = source.training, source.validation
    return MemorySource(
        (shrink(train, wanted), train_labels), (shrink(val, wanted), val_labels), source.augmentation, source.notes
    )


def in_memory(train: Arrays, test: Arrays, config: DatasetConfig) -> MemorySource:
    """Two published splits as a source: pictures [N, H, W] or [N, H, W, C], uint8, and labels [N], checked.

    Raises:
        ValueError: as `labelled` and `MemorySource`.
    """
    training, notes = labelled("train", *train)
    validation, more = labelled("test", *test)
    return MemorySource(training, validation, config.augment, (*notes, *more))


def in_folder(folder: Path, config: DatasetConfig) -> FolderSource:
    """A folder of pictures as a source.

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


def holds_pictures(folder: Path) -> bool:
    """Whether a folder has pictures in it, in one of the layouts.

    Raises:
        ValueError: in several.
    """
    return find_layout(folder) is not None
