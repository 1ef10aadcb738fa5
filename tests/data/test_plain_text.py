"""Text as blocks of tokens: contents of blocks, caching, and errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qat_runner.data import plain_text
from qat_runner.data.batches import WHOLE, Batch, Shard
from qat_runner.data.plain_text import TextData, files_of, holds_text, tokens_of
from tests.tiny import END, byte_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data(train: int = 50, val: int = 23, shard: Shard = WHOLE, seed: int = 0) -> TextData:
    """Make data whose tokens count up from 0."""
    return TextData(np.arange(train, dtype=np.int32), np.arange(val, dtype=np.int32), 8, CPU, seed, shard)


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.inputs[0].tolist()]


def test_every_token_but_the_first_is_a_target_once() -> None:
    batches = list(data().val_batches(2))
    assert [tuple(batch.targets.shape) for batch in batches] == [(2, 8), (1, 6)]
    assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == list(range(1, 23))
    for batch in batches:
        assert torch.equal(batch.inputs[0] + 1, batch.targets)
    assert data().val_size == 3
    assert [tuple(batch.targets.shape) for batch in data(val=17).val_batches(2)] == [(2, 8)]


def test_order_is_that_of_seed_and_epoch_from_any_place_on() -> None:
    first = rows(list(data().train_batches(2, epoch=3)))
    assert sorted(row[0] for row in first) == [0, 8, 16, 24, 32, 40]
    assert rows(list(data().train_batches(2, epoch=3, start=1))) == first[2:]
    assert rows(list(data().train_batches(2, epoch=3))) == first
    assert rows(list(data().train_batches(2, epoch=4))) != first
    assert rows(list(data(seed=1).train_batches(2, epoch=3))) != first


def test_processes_share_the_batches() -> None:
    parts = [data(shard=Shard(rank, 2)) for rank in (0, 1)]
    whole = list(data().train_batches(4, epoch=0))
    shared = [list(part.train_batches(4, epoch=0)) for part in parts]
    for batch, *both in zip(whole, *shared, strict=True):
        assert sorted(rows([batch])) == sorted(rows(both))
    tokens = [batch.targets for part in parts for batch in part.val_batches(1)]
    assert sorted(torch.cat([t.flatten() for t in tokens]).tolist()) == list(range(1, 23))


def test_files_become_tokens_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    text = "Zwölf Boxkämpfer\r\njagen\n\nViktor.\n" * 3
    (tmp_path / "train.txt").write_bytes(text.encode())
    monkeypatch.setattr(plain_text, "PIECE", 20)
    ids = tokens_of(files_of(tmp_path, "train"), tokenizer)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text  # equal to the byte
    assert len(ids) == len(text.encode())
    assert len([*cache.glob("text_*.npz")]) == 1
    monkeypatch.setattr(plain_text, "_tokenize", None)
    assert np.array_equal(tokens_of(files_of(tmp_path, "train"), tokenizer), ids)


def test_a_damaged_cache_is_made_anew(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "val.txt").write_text("some text\n")
    ids = tokens_of(files_of(tmp_path, "val"), byte_tokenizer())
    (kept,) = cache.glob("text_*.npz")
    for content in (b"", kept.read_bytes()[:-40]):
        kept.write_bytes(content)
        assert np.array_equal(tokens_of(files_of(tmp_path, "val"), byte_tokenizer()), ids)
    np.savez(kept, ids=np.array([5, 10_000], np.int32))  # from another vocabulary
    assert np.array_equal(tokens_of(files_of(tmp_path, "val"), byte_tokenizer()), ids)


def test_files_of_a_folder_have_the_end_of_a_text_between_them(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name, text in (("b", "second"), ("a", "first")):
        (tmp_path / "train" / f"{name}.txt").write_text(text)
    assert not holds_text(tmp_path)
    (tmp_path / "val.txt").write_text("x")
    assert holds_text(tmp_path)
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokens_of(files_of(tmp_path, "train"), tokenizer)) == f"first{END}second"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 text: byte 3 is 0xff"):
        tokens_of(files_of(tmp_path, "train"), byte_tokenizer())
    with pytest.raises(ValueError, match="train has 8 tokens; must have at least 9: a block and the token after it"):
        data(train=8)
    with pytest.raises(ValueError, match="val has 1 tokens"):
        data(val=1)


def test_hidden_files_and_folders_are_no_texts(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    (folder / "folder.txt").mkdir(parents=True)
    for name in ("b.txt", "a.txt", ".c.txt", "._a.txt"):
        (folder / name).write_text("x")
    (folder / ".#a.txt").symlink_to("nowhere")
    assert [path.name for path in files_of(tmp_path, "train")] == ["a.txt", "b.txt"]
    (tmp_path / "train.txt").write_text("y")
    with pytest.raises(ValueError, match=r"there are both train\.txt and the folder train; remove one of them"):
        files_of(tmp_path, "train")
