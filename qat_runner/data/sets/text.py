"""Plain text of one's own."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset, Delivery
from qat_runner.data.plain_text import CONTENT, SPLITS, TextData, files_of, holds_text, tokens_of


def read(folder: Path, config: DatasetConfig, delivery: Delivery) -> TextData:
    """Both splits, as blocks of tokens.

    Args:
        folder: holds train.txt and val.txt, or folders of such files.
        config: the length of a block.
        delivery: with a tokenizer.

    Raises:
        ValueError: a file is no text, or a split is too short for a block.
    """
    training, validation = (tokens_of(files_of(folder, split), delivery.tokenizer) for split in SPLITS)
    return TextData(training, validation, config.max_length, delivery.device, delivery.seed, delivery.shard)


DATASET = Dataset("language_modelling", read, holds=holds_text, content=CONTENT)
