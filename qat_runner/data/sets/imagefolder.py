"""Pictures of the user's own, in class folders."""

from qat_runner.data.dataset import Dataset
from qat_runner.data.pictures import FOLDERS, holds_class_folders, in_class_folders, pictures

DATASET = Dataset("classification", pictures(in_class_folders), holds=holds_class_folders, content=FOLDERS)
