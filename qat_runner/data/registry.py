"""Find a data set on disk and read it."""

from pathlib import Path

from qat_runner.config import DatasetConfig, path_of
from qat_runner.data.batches import Data
from qat_runner.data.dataset import Delivery
from qat_runner.data.listing import printable
from qat_runner.data.sets import DATASETS
from qat_runner.errors import ConfigError, one_line
from qat_runner.wording import one_of

PREPARE = "python -m qat_runner.data.prepare"


def find_dataset(config: DatasetConfig, data_dir: str) -> Path:
    """Return the folder that contains a data set: data_dir itself or its subfolder named after the data set.

    Raises:
        ConfigError: the name is unknown, the task is not the one of the data set, a folder cannot be read, or neither
            folder contains the data set. In the last case the message says what the folder must contain, and which
            command prepares it.
    """
    if config.name not in DATASETS:
        raise ConfigError(f"dataset.name={config.name}: {one_of(config.name, DATASETS)}")
    dataset = DATASETS[config.name]
    if config.task != dataset.task:
        raise ConfigError(f"dataset.task={config.task}: must be {dataset.task}, the task of {config.name}")
    root = path_of(data_dir)
    try:
        for folder in (root, root / config.name):
            if dataset.holds is None or (folder.is_dir() and dataset.holds(folder)):
                return folder
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset={config.name}: data_dir={printable(data_dir)}: {error}") from error
    command = f" ('{PREPARE} {config.name} DATA_DIR' {dataset.fetching})" if dataset.fetch is not None else ""
    raise ConfigError(
        f"dataset={config.name}: not found in data_dir={data_dir}; this folder (or {root / config.name}) must contain "
        f"{dataset.content}{command}"
    )


def load_dataset(config: DatasetConfig, data_dir: str, delivery: Delivery) -> Data:
    """Read a data set.

    Args:
        config: the data set, and how to read it.
        data_dir: the folder of data sets.
        delivery: where batches are delivered, and in which form.

    Raises:
        ConfigError: the data set is missing, or does not match its config.
    """
    folder = find_dataset(config, data_dir)
    try:
        return DATASETS[config.name].read(folder, config, delivery)
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception as error:  # parsers may raise any exception on files of another kind
        reason = one_line(error) or type(error).__name__
        raise ConfigError(f"dataset={config.name}: {printable(str(folder))} cannot be read ({reason})") from error
