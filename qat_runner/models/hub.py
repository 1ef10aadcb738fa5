"""Load parts of a checkpoint through transformers, from a folder or by a name on the Hugging Face hub."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

from torch import nn

from qat_runner.config import path_of
from qat_runner.errors import ConfigError


def load_tokenizer(checkpoint: str) -> Any:
    """Load the fast tokenizer of a checkpoint, which can return the positions of its tokens in the text.

    Raises:
        ConfigError: the checkpoint has no fast tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = load_from_checkpoint(checkpoint, AutoTokenizer.from_pretrained, "a network with a tokenizer")
    if not tokenizer.is_fast:
        raise ConfigError(f"model.checkpoint={checkpoint}: has no fast tokenizer (tokenizer.json or vocab.txt)")
    return tokenizer


def load_from_checkpoint(checkpoint: str, load: Callable[..., Any], wanted: str, said: str | None = None) -> Any:
    """Load a part of a checkpoint. Code that comes with the checkpoint is never run.

    Args:
        checkpoint: a folder as `save_pretrained` writes it, or a name on the hub.
        load: a `from_pretrained` method.
        wanted: what the checkpoint must be, for messages.
        said: the config key and its value that select the checkpoint, for messages; None: model.checkpoint.

    Raises:
        ConfigError: the folder has no config.json, or loading fails for any reason.
    """
    said = said or f"model.checkpoint={checkpoint}"
    folder = path_of(checkpoint)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{said}: the folder contains no config.json")
    try:
        with quiet():
            return load(str(folder) if folder.is_dir() else checkpoint, trust_remote_code=False)
    except Exception as error:  # parsers, downloads and missing files may raise any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{said}: must be a folder with {wanted}, or its name on the Hugging Face hub ({reason})"
        ) from error


def load_whole(checkpoint: str, load: Callable[..., Any], wanted: str, head: str | None = None) -> nn.Module:
    """Load a network with its weights, and check that none are missing.

    transformers alone would silently initialize weights that a checkpoint lacks, or has under other names.

    Args:
        checkpoint, load, wanted: as in `load_from_checkpoint`.
        head: the only module whose weights may be missing; they are initialized from torch's global random state.

    Raises:
        ConfigError: as in `load_from_checkpoint`, or other weights are missing.
    """
    network, info = load_from_checkpoint(checkpoint, functools.partial(load, output_loading_info=True), wanted)
    missing = sorted(key for key in info["missing_keys"] if head is None or not key.startswith(f"{head}."))
    if missing:
        raise ConfigError(
            f"model.checkpoint={checkpoint}: tensor {missing[0]} is missing ({len(missing)} in total); "
            f"must contain all weights of {wanted}, under the names that transformers uses"
        )
    model: nn.Module = network
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages and progress bars of transformers within the context."""
    from huggingface_hub.utils import logging as of_hub
    from transformers.utils import logging

    level, level_of_hub = logging.get_verbosity(), of_hub.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    of_hub.set_verbosity(CRITICAL)  # it would log each retry
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        of_hub.set_verbosity(level_of_hub)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
