"""What tasks on texts ask of a config alike: networks come from checkpoints, which know how long a text may be."""

from qat_runner.config import Config
from qat_runner.errors import ConfigError


def checkpoint_of(config: Config) -> str:
    """The checkpoint that a config names.

    Raises:
        ConfigError: it names none.
    """
    if config.model.checkpoint is None:
        raise ConfigError(f"model={config.model.name}: needs model.checkpoint=FOLDER or a name on the Hugging Face hub")
    return config.model.checkpoint


def check_length(config: Config, positions: int | None) -> None:
    """Refuse inputs that are longer than a checkpoint has positions for; None: it has no end of them.

    Raises:
        ConfigError: they are.
    """
    if positions is not None and config.dataset.max_length > positions:
        raise ConfigError(
            f"dataset.max_length={config.dataset.max_length}: must be {positions} or less, the positions of "
            f"{config.model.checkpoint}"
        )
