"""The user's own images, as class folders, tar shards or parquet files."""

from qat_runner.data.dataset import Dataset
from qat_runner.data.image_readers import holds_images, image_reader, in_folder
from qat_runner.data.layouts import CONTENT

DATASET = Dataset("classification", image_reader(in_folder), holds=holds_images, content=CONTENT)
