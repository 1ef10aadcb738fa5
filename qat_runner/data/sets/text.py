"""The user's own plain text."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset, Delivery
from qat_runner.data.plain_text import CONTENT, SPLITS, TextData, files_of, holds_text, tokens_of


def read(folder: Path, config: DatasetConfig, delivery: Delivery) -> TextData:
    """Read both splits as blocks of tokens.

    Args:
        folder: contains train.txt and val.txt, or folders train and val of text files.
        config: sets the length of a block.
        delivery: must have a tokenizer.

    Raises:
        ValueError: a file is not text, or a split is too short for a block.
    """
    training, validation = (tokens_of(files_of(folder, split), delivery.tokenizer) for split in SPLITS)
    return TextData(training, validation, config.max_length, delivery.device, delivery.seed, delivery.shard)


DATASET = Dataset("language_modelling", read, holds=holds_text, content=CONTENT)
