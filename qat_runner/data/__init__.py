"""Data sets by name, as batches of normalized pictures."""

from qat_runner.data.images import AUGMENTATIONS, Batch, ImageData
from qat_runner.data.registry import DATASETS, find_dataset, load_dataset

__all__ = ["AUGMENTATIONS", "DATASETS", "Batch", "ImageData", "find_dataset", "load_dataset"]
