"""What a data set is to the runner: its task, what lies on the disk, and how it is read and fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat_runner.config import DatasetConfig
from qat_runner.data.batches import WHOLE, Data, Shard


@dataclass(frozen=True)
class Delivery:
    """Where batches are wanted, and how."""

    device: torch.device
    seed: int
    """of order and augmentation"""
    channels_last: bool = False
    """memory layout of pictures"""
    tokenizer: Any = None
    """of text: a fast one of transformers"""
    shard: Shard = WHOLE
    """of this process, where several share the work"""


@dataclass(frozen=True)
class Dataset:
    """A data set, whose name is that of its file in `data/sets/` and of its YAML file."""

    task: str
    """name of what is learned of it, one of `qat_runner.tasks.TASKS`"""
    read: Callable[[Path, DatasetConfig, Delivery], Data]
    """of a folder that holds it; may raise anything on files that are something else"""
    holds: Callable[[Path], bool] | None = None
    """whether a folder holds it; None: there is nothing to hold"""
    content: str = ""
    """what must lie in that folder"""
    fetch: Callable[[Path], object] | None = None
    """download or unpack it into a folder; None: that is up to the user"""
    fetching: str = "downloads it"
    """what `fetch` does, after the command that asks for it"""
