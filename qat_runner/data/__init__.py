"""Data sets by name, read as batches of model inputs and targets."""

from qat_runner.data.batches import Batch, Data
from qat_runner.data.dataset import Dataset, Delivery
from qat_runner.data.images import AUGMENTATIONS, ImageData
from qat_runner.data.registry import find_dataset, load_dataset
from qat_runner.data.sets import DATASETS

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batch",
    "Data",
    "Dataset",
    "Delivery",
    "ImageData",
    "find_dataset",
    "load_dataset",
]
