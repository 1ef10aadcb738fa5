"""The user's own images, as class folders, tar shards or parquet files."""

from qat_runner.data.dataset import Dataset
from qat_runner.data.layouts import CONTENT
from qat_runner.data.pictures import holds_pictures, in_folder, pictures

DATASET = Dataset("classification", pictures(in_folder), holds=holds_pictures, content=CONTENT)
