"""Finding a data set on the disk, and reading it."""

from pathlib import Path

from qat_runner.config import DatasetConfig, path_of
from qat_runner.data.batches import Data
from qat_runner.data.dataset import Delivery
from qat_runner.data.listing import printable
from qat_runner.data.sets import DATASETS
from qat_runner.errors import ConfigError, told

PREPARE = "python -m qat_runner.data.prepare"


def find_dataset(config: DatasetConfig, data_dir: str) -> Path:
    """The folder that holds a data set: data_dir itself or its subfolder of the data set's name.

    Raises:
        ConfigError: unknown name, or another task than it is for; a folder that cannot be read; it lies in neither, the
            message says what must lie where, and which command prepares it.
    """
    if config.name not in DATASETS:
        raise ConfigError(f"dataset.name={config.name}: must be one of {', '.join(DATASETS)}")
    dataset = DATASETS[config.name]
    if config.task != dataset.task:
        raise ConfigError(f"dataset.task={config.task}: must be {dataset.task}, which is what {config.name} is for")
    root = path_of(data_dir)
    try:
        for folder in (root, root / config.name):
            if dataset.holds is None or (folder.is_dir() and dataset.holds(folder)):
                return folder
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset={config.name}: data_dir={printable(data_dir)}: {error}") from error
    command = f" ('{PREPARE} {config.name} DATA_DIR' {dataset.fetching})" if dataset.fetch is not None else ""
    raise ConfigError(
        f"dataset={config.name}: not found in data_dir={data_dir}; there (or in {root / config.name}) must lie "
        f"{dataset.content}{command}"
    )


def load_dataset(config: DatasetConfig, data_dir: str, delivery: Delivery) -> Data:
    """Read a data set.

    Args:
        config: which one, and how it is to be read.
        data_dir: where data sets lie.
        delivery: where batches are wanted, and how.

    Raises:
        ConfigError: it is not there, or is not what its config says.
    """
    folder = find_dataset(config, data_dir)
    try:
        return DATASETS[config.name].read(folder, config, delivery)
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a parser may raise on files that are something else
        reason = told(error) or type(error).__name__
        raise ConfigError(f"dataset={config.name}: {printable(str(folder))} cannot be read ({reason})") from error
