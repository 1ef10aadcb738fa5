"""SQuAD v1.1, from the official files or other files in the same format."""

from pathlib import Path

from qat_runner.config import DatasetConfig
from qat_runner.data.dataset import Dataset, Delivery
from qat_runner.data.squad import FILES, holds_squad, load_split, prepare_squad
from qat_runner.data.windows import SquadData


def read(folder: Path, config: DatasetConfig, delivery: Delivery) -> SquadData:
    """Read both splits as windows.

    Args:
        folder: contains FILES.
        config: sets the lengths of windows, and selects the questions.
        delivery: must have a tokenizer.

    Raises:
        ValueError: a file is not valid.
    """
    tokenizer = delivery.tokenizer
    training = load_split(folder / FILES[0], config, tokenizer, config.train_questions)
    validation = load_split(folder / FILES[1], config, tokenizer, config.val_questions)
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    return SquadData(training, validation, config, special, delivery.device, delivery.seed, delivery.shard)


DATASET = Dataset(
    "question_answering",
    read,
    holds=holds_squad,
    content=" and ".join(FILES),
    fetch=prepare_squad,
    fetching="downloads them",
)
