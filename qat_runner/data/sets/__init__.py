"""The data sets. Each has its own file, which has the name of the data set and defines its `DATASET`."""

import pkgutil
from importlib import import_module

from qat_runner.data.dataset import Dataset
from qat_runner.plugins import Registry

DATASETS: Registry[Dataset] = Registry(
    "data set",
    "qat_runner.datasets",
    {module.name: import_module(f"{__name__}.{module.name}").DATASET for module in pkgutil.iter_modules(__path__)},
    valid=lambda dataset: isinstance(dataset, Dataset),
)
"""The data sets by name."""
