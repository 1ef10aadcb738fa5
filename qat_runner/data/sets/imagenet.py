"""ILSVRC2012 in class folders."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset
from qat_runner.data.folder import FolderSource
from qat_runner.data.imagenet import FIRST_CLASS, LAST_CLASS, prepare_imagenet
from qat_runner.data.pictures import FOLDERS, holds_class_folders, in_class_folders, pictures


def read(folder: Path, config: DatasetConfig) -> FolderSource:
    """Both splits.

    Raises:
        ValueError: the classes are not ImageNet's, or as `FolderSource`.
    """
    source = in_class_folders(folder, config)
    ends = source.classes[0], source.classes[-1]
    if ends != (FIRST_CLASS, LAST_CLASS):
        raise ValueError(
            f"the first and last class folders are {ends[0]} and {ends[1]}, not {FIRST_CLASS} and {LAST_CLASS}; "
            f"dataset=imagefolder takes any"
        )
    return source


DATASET = Dataset(
    "classification",
    pictures(read),
    holds=holds_class_folders,
    content=FOLDERS,
    fetch=prepare_imagenet,
    fetching="makes them from the official tar files",
)
