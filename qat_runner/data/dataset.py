"""The description of a data set: its task, its files on disk, and how it is read and downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat_runner.config import DatasetConfig
from qat_runner.data.batches import WHOLE, Data, Shard


@dataclass(frozen=True)
class Delivery:
    """Where batches are delivered, and in which form."""

    device: torch.device
    seed: int
    """seed of the data order and of the augmentation"""
    channels_last: bool = False
    """whether image batches have the channels_last memory layout"""
    tokenizer: Any = None
    """for text: a fast tokenizer of transformers"""
    shard: Shard = WHOLE
    """the part of the data that this process works on, where several processes share the work"""


@dataclass(frozen=True)
class Dataset:
    """A data set. Its name is the name of its file in `data/sets/` and of its YAML file."""

    task: str
    """name of the task that it is for, one of `qat_runner.tasks.TASKS`"""
    read: Callable[[Path, DatasetConfig, Delivery], Data]
    """reads it from the folder that contains it; may raise any exception on files of another kind"""
    holds: Callable[[Path], bool] | None = None
    """tells whether a folder contains it; None: it has no files"""
    content: str = ""
    """what that folder must contain, for messages"""
    fetch: Callable[[Path], object] | None = None
    """downloads or unpacks it into a folder; None: the user has to provide it"""
    fetching: str = "downloads it"
    """what `fetch` does, in words that follow the command in messages"""
