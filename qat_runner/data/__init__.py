"""Data sets by name, as batches of what a model takes."""

from qat_runner.data.batches import Batch, Data, Totals
from qat_runner.data.images import AUGMENTATIONS, ImageData
from qat_runner.data.registry import DATASETS, find_dataset, load_dataset

__all__ = ["AUGMENTATIONS", "DATASETS", "Batch", "Data", "ImageData", "Totals", "find_dataset", "load_dataset"]
