"""Plain text as blocks of tokens, each with the token that follows it.

A split is one file, or a folder of files. The files of a folder are read one after another, separated by the
tokenizer's end-of-text token if it has one. A split is tokenized once and cached; the cache key is its content and the
tokenizer.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from qat_runner.cache import cache_folder
from qat_runner.data.array_cache import CacheMissError, cache_tokens, cached_numbers, key_of, load_arrays
from qat_runner.data.batches import WHOLE, Batch, Shard, to_device, train_rows

Ids = NDArray[np.int32]

SPLITS = ("train", "val")
CONTENT = "train.txt and val.txt, or folders train and val of *.txt files; all of them UTF-8"
VERSION = 1
"""Version of the tokenization; tokens of another version in the cache are not used."""

PIECE = 2**20
"""Minimum number of characters that are tokenized at a time; a piece ends at the end of a line."""

log = logging.getLogger("qat_runner")


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, sorted by name, without hidden ones; an empty list if the split is missing.

    Raises:
        ValueError: the split exists both as a file and as a folder.
    """
    alone = folder / f"{split}.txt"
    found = sorted(path for path in (folder / split).glob("*.txt") if path.is_file() and not path.name.startswith("."))
    if alone.is_file():
        if found:
            raise ValueError(f"there are both {split}.txt and the folder {split}; remove one of them")
        return [alone]
    return found


def holds_text(folder: Path) -> bool:
    """Return whether a folder contains both splits."""
    with suppress(ValueError):  # reading the split will raise the error again
        return all(files_of(folder, split) for split in SPLITS)
    return True


def tokens_of(files: Sequence[Path], tokenizer: Any) -> Ids:
    """Return the tokens of files, [T], from the cache if possible; otherwise tokenize the files and cache the tokens.

    Args:
        files: UTF-8 files; their content and the tokenizer are the cache key.
        tokenizer: a fast tokenizer of transformers; the only special token added is the end of a text between files.

    Raises:
        ValueError: a file is not UTF-8 text.
    """
    contents = [path.read_bytes() for path in files]
    said = [tokenizer.backend_tokenizer.to_str(), repr(tokenizer.eos_token_id)]
    parts = [*(text.encode() for text in said), *contents]
    key = key_of(VERSION, PIECE, *(hashlib.sha256(part).hexdigest() for part in parts))
    cached = cache_folder() / f"text_{key}.npz"
    with suppress(CacheMissError):
        kept = load_arrays(cached)
        return cached_numbers(kept, "ids", np.int32, len(kept.get("ids", ())), range(len(tokenizer)))
    texts = [_decoded(path, content) for path, content in zip(files, contents, strict=True)]
    ids = _tokenize(texts, tokenizer, files[0].parent.name if len(files) > 1 else files[0].name)
    cache_tokens(cached, files[0].name, {"ids": ids})
    return ids


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
        ) from error


def _tokenize(texts: Sequence[str], tokenizer: Any, name: str) -> Ids:
    end = [] if tokenizer.eos_token_id is None else [np.array([tokenizer.eos_token_id], np.int32)]
    found: list[Ids] = []
    hidden = not sys.stderr.isatty()
    with tqdm(
        total=sum(map(len, texts)), desc=f"tokenizing {name}", unit_scale=True, disable=hidden, leave=False
    ) as bar:
        for number, text in enumerate(texts):
            found += end if number else []
            for piece in _pieces(text):
                encoded = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)
                found.append(np.array(encoded["input_ids"], np.int32))
                bar.update(len(piece))
    return np.concatenate([*found, np.empty(0, np.int32)])


def _pieces(text: str) -> Iterator[str]:
    """Split a text into pieces of PIECE characters, each extended to the end of its line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE - 1) + 1 or len(text)
        yield text[start:end]
        start = end


@dataclass
class TextData:
    """Text as `Data`: inputs are tokens, int64 [N, L]; targets are the tokens that follow them, int64 [N, L].

    Blocks are consecutive, so every token of the text except the first is a target once. Training leaves out the
    incomplete block at the end; validation has it as a shorter block in a separate batch. Nothing is padded.
    """

    training: Ids
    validation: Ids
    length: int
    """tokens per block, L"""
    device: torch.device
    seed: int
    shard: Shard = WHOLE

    name = "text"
    notes = ()
    corrupt = None

    def __post_init__(self) -> None:
        for split, ids, needed in (("train", self.training, self.length + 1), ("val", self.validation, 2)):
            if len(ids) < needed:
                raise ValueError(
                    f"{split} has {len(ids)} tokens; must have at least {needed}: a block and the token after it"
                )

    @property
    def train_size(self) -> int:
        return (len(self.training) - 1) // self.length

    @property
    def val_size(self) -> int:
        return -(-(len(self.validation) - 1) // self.length)

    def train_steps(self, batch_size: int) -> int:
        return max(self.train_size // batch_size, 1)

    def train_batches(self, batch_size: int, epoch: int, limit: int | None = None, start: int = 0) -> Iterator[Batch]:
        for rows in train_rows(self, batch_size, epoch, limit, start):
            yield self._batch(self.training, self.length * rows, self.length)

    def val_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        whole, rest = divmod(len(self.validation) - 1, self.length)
        starts = self.length * np.arange(whole)
        parts = [(starts[i : i + batch_size], self.length) for i in range(0, whole, batch_size)]
        if rest:
            parts.append((np.array([self.length * whole]), rest))
        for batch, (begin, length) in enumerate(parts[:limit]):
            if self.shard.owns(batch):
                yield self._batch(self.validation, begin, length)

    def _batch(self, ids: Ids, starts: NDArray[np.int64], length: int) -> Batch:
        chosen = torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)].astype(np.int64))
        tokens, following = (to_device(part.contiguous(), self.device) for part in (chosen[:, :-1], chosen[:, 1:]))
        return Batch((tokens,), following)
