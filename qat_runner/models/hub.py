"""What is asked of checkpoints of transformers, by folder or by name on the hub; a failure is told in a sentence."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from qat_runner.errors import ConfigError


def load_tokenizer(checkpoint: str) -> Any:
    """The tokenizer of a checkpoint: a fast one, which knows where in the text its tokens are.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = ask(checkpoint, AutoTokenizer.from_pretrained, "a network with a tokenizer")
    if not tokenizer.is_fast:
        raise ConfigError(f"model.checkpoint={checkpoint}: has no fast tokenizer (tokenizer.json or vocab.txt)")
    return tokenizer


def ask(checkpoint: str, load: Callable[..., Any], wanted: str) -> Any:
    """Load something of a checkpoint.

    Args:
        checkpoint: a folder as `save_pretrained` writes it, or a name on the hub.
        load: of transformers; its first argument is the checkpoint.
        wanted: what it must be, for the message.

    Raises:
        ConfigError: it cannot be loaded.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"model.checkpoint={checkpoint}: the folder holds no config.json")
    try:
        with _quiet():
            return load(str(folder) if folder.is_dir() else checkpoint)
    except Exception as error:  # whatever a parser, a download or a missing file may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.checkpoint={checkpoint}: must be a folder with {wanted}, or its name on the Hugging Face hub "
            f"({reason})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' messages and progress bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
