"""ILSVRC2012, as class folders, tar shards, or the parquet files of the Hugging Face hub."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset
from qat_runner.data.folder import FolderSource
from qat_runner.data.image_readers import holds_images, image_reader, in_folder
from qat_runner.data.imagenet import FIRST_CLASS, LAST_CLASS, prepare_imagenet
from qat_runner.data.layouts import CLASS_FOLDERS, CONTENT, find_layout


def read(folder: Path, config: DatasetConfig) -> FolderSource:
    """Read both splits.

    Raises:
        ValueError: the classes are not ImageNet's, or as `FolderSource`.
    """
    source = in_folder(folder, config)
    ends = source.classes[0], source.classes[-1]
    if find_layout(folder) == CLASS_FOLDERS and ends != (FIRST_CLASS, LAST_CLASS):
        raise ValueError(
            f"the first and last class folders are {ends[0]} and {ends[1]}; must be {FIRST_CLASS} and {LAST_CLASS} "
            f"(dataset=imagefolder accepts any classes)"
        )
    return source


DATASET = Dataset(
    "classification",
    image_reader(read),
    holds=holds_images,
    content=CONTENT,
    fetch=prepare_imagenet,
    fetching="makes them from the official tar files",
)
