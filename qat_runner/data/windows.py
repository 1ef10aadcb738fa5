"""SQuAD as batches of windows."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qat_runner.config import DatasetConfig, Padding
from qat_runner.data.batches import WHOLE, Batch, Shard, to_device, train_rows
from qat_runner.data.squad import Split


@dataclass
class SquadData:
    """SQuAD as `Data`: inputs are ids, attention mask and token types, int64 [N, L] each; targets are int64 [N, 2].

    Logits are [N, L, 2]: for each position, the logit that the answer starts there and the logit that it ends there.
    """

    training: Split
    validation: Split
    config: DatasetConfig
    special: tuple[int, int, int]
    """ids of [CLS], [SEP] and [PAD]"""
    device: torch.device
    seed: int
    shard: Shard = WHOLE

    name = "squad"
    notes = ()
    corrupt = None

    @property
    def train_size(self) -> int:
        return len(self.training.windows)

    @property
    def val_size(self) -> int:
        return len(self.validation.windows)

    def train_steps(self, batch_size: int) -> int:
        return max(self.train_size // batch_size, 1)

    def train_batches(self, batch_size: int, epoch: int, limit: int | None = None, start: int = 0) -> Iterator[Batch]:
        for rows in train_rows(self, batch_size, epoch, limit, start):
            yield self._batch(self.training, rows)

    def val_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        for batch, start in enumerate(itertools.islice(range(0, self.val_size, batch_size), limit)):
            if self.shard.owns(batch):
                yield self._batch(self.validation, np.arange(start, min(start + batch_size, self.val_size)))

    def _batch(self, split: Split, rows: np.ndarray) -> Batch:
        cls, sep, pad = self.special
        windows, tokens = split.windows, split.tokens
        ends = windows.prefix[rows] + windows.length[rows]  # position of the second [SEP]
        width = self.config.max_length if self.config.padding == Padding.max_length else int(ends.max()) + 1
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        for out, row in zip(ids, rows, strict=True):
            start, end = windows.start[row], windows.start[row] + windows.length[row]
            context = tokens.contexts[split.questions[windows.question[row]].paragraph][start:end]
            text = (*tokens.questions[windows.question[row]], sep, *context, sep)
            out[0] = cls
            out[1 : 1 + len(text)] = text
        place = np.arange(width)
        mask = (place <= ends[:, None]).astype(np.int64)
        types = mask * (place >= windows.prefix[rows, None])
        inputs = tuple(to_device(torch.from_numpy(t), self.device) for t in (ids, mask, types))
        return Batch(inputs, to_device(torch.from_numpy(windows.answer[rows]), self.device))
