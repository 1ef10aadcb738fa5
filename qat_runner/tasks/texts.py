"""Checks that the text tasks share: their networks come from checkpoints, which limit the length of a text."""

from qat_runner.config import Config
from qat_runner.errors import ConfigError


def checkpoint_of(config: Config) -> str:
    """Return the checkpoint that a config sets.

    Raises:
        ConfigError: the config does not set one.
    """
    if config.model.checkpoint is None:
        raise ConfigError(f"model={config.model.name}: needs model.checkpoint=FOLDER or a name on the Hugging Face hub")
    return config.model.checkpoint


def check_length(config: Config, positions: int | None) -> None:
    """Check the length of inputs against the number of positions of a checkpoint; None: it is unlimited.

    Raises:
        ConfigError: the inputs are longer.
    """
    if positions is not None and config.dataset.max_length > positions:
        raise ConfigError(
            f"dataset.max_length={config.dataset.max_length}: must be at most {positions}, the number of positions of "
            f"{config.model.checkpoint}"
        )
