import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from qat_runner.config import DatasetConfig
from qat_runner.data import Delivery, squad
from qat_runner.data.sets.squad import read
from qat_runner.data.squad import Split, load_split, make_windows, read_squad
from qat_runner.data.windows import SquadData
from qat_runner.models import load_tokenizer
from tests.splits import SPLITS
from tests.tiny import paragraph, squad_file, tiny_bert, tiny_squad

CPU = torch.device("cpu")
CONFIG = DatasetConfig(name="squad", max_length=32, stride=8, val_batch_size=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny_bert(tmp_path_factory.mktemp("bert"))))


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> SquadData:
    return read(tiny_squad(tmp_path / "squad"), CONFIG, Delivery(CPU, seed=3, tokenizer=tokenizer))


@given(SPLITS)
def test_windows_cover_each_paragraph_in_order(split: Split) -> None:
    w = split.windows
    assert (np.diff(w.question) >= 0).all()
    for i, question in enumerate(split.questions):
        rows = np.flatnonzero(w.question == i)
        total = len(split.contexts[i])
        covered = set().union(*(range(w.start[r], w.start[r] + w.length[r]) for r in rows))
        assert covered == set(range(total))
        assert (w.start[rows] + w.length[rows] == total).sum() == 1  # no window follows the one that reaches the end
        for r in rows:
            inside = w.start[r] <= question.start < w.start[r] + w.length[r]
            position = w.prefix[r] + question.start - w.start[r]
            assert w.answer[r].tolist() == ([position, position] if inside else [0, 0])


def test_batches_are_what_the_tokenizer_itself_makes(data: SquadData, tokenizer: Any) -> None:
    whole = replace(data.config, max_length=64)
    windows = make_windows(data.training.tokens, data.training.questions, 64, 64)
    data = replace(data, config=whole, training=replace(data.training, windows=windows))
    batch = data._batch(data.training, np.arange(4))
    texts = [(q.text, data.training.contexts[q.paragraph]) for q in data.training.questions[:4]]
    expected = tokenizer(*map(list, zip(*texts, strict=True)), padding="max_length", max_length=64, return_tensors="pt")
    for ours, name in zip(batch.inputs, ("input_ids", "attention_mask", "token_type_ids"), strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected[name])
    for ids, (first, last), q in zip(batch.inputs[0], batch.targets, data.training.questions, strict=False):
        assert tokenizer.decode(ids[first : last + 1]) == q.answers[0].lower()


def test_padding_to_the_longest_changes_the_width_alone(data: SquadData) -> None:
    short = replace(data, config=replace(data.config, padding="longest", max_length=40))
    long = replace(data, config=replace(data.config, max_length=40))
    for a, b in zip(short.val_batches(3), long.val_batches(3), strict=True):
        width = a.inputs[0].shape[1]
        assert width == int(b.inputs[1].sum(1).max()) < 40
        assert torch.equal(a.inputs[0], b.inputs[0][:, :width])
        assert torch.equal(a.targets, b.targets)


def test_order_depends_on_seed_and_epoch_alone(data: SquadData) -> None:
    def order(data: SquadData, epoch: int) -> list[float]:
        return [batch.inputs[0].double().std().item() for batch in data.train_batches(4, epoch)]

    first = order(data, 1)
    order(data, 0)
    assert order(data, 1) == first
    assert order(data, 2) != first
    assert order(replace(data, seed=4), 1) != first
    assert len(first) == data.train_steps(4) == data.train_size // 4
    assert sum(batch.size for batch in data.val_batches(5)) == data.val_size


def test_tokens_come_from_the_cache(
    tmp_path: Path, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = squad_file(tmp_path / "dev.json", 4)
    first = load_split(path, CONFIG, tokenizer, None)
    (kept,) = cache.glob("squad_*.npz")
    called: list[str] = []
    encode = squad._encode
    monkeypatch.setattr(squad, "_encode", lambda *args: (called.append("x"), encode(*args))[1])
    again = load_split(path, CONFIG, tokenizer, None)
    assert not called
    assert np.array_equal(first.windows.answer, again.windows.answer)
    for content in (kept.read_bytes()[:100], b""):  # damaged: tokenized again
        kept.write_bytes(content)
        assert np.array_equal(load_split(path, CONFIG, tokenizer, None).tokens.spans.values, first.tokens.spans.values)
    assert len(called) == 4
    load_split(squad_file(path, 5), CONFIG, tokenizer, None)  # another file
    assert len(called) == 6
    assert len([*cache.iterdir()]) == 2


def test_long_questions_are_cut(tmp_path: Path, tokenizer: Any) -> None:
    content = json.loads(squad_file(path := tmp_path / "dev.json", 1).read_text())
    first, second = content["data"][0]["paragraphs"][0]["qas"]
    first["question"], second["question"] = "where does " * 32 + "anna live?", "where " * 64
    path.write_text(json.dumps(content))
    split = load_split(path, replace(CONFIG, max_length=96), tokenizer, None)
    where, does = tokenizer.convert_tokens_to_ids(["where", "does"])
    assert [split.tokens.questions[i].tolist() for i in range(2)] == [[where, does] * 32, [where] * 64]
    assert split.windows.prefix.tolist() == [66, 66]
    assert split.questions[0].text.endswith("anna live?")


def test_a_part_of_the_questions(tmp_path: Path, tokenizer: Any) -> None:
    path = squad_file(tmp_path / "dev.json", 10)
    some = load_split(path, CONFIG, tokenizer, 5)
    assert [q.id for q in some.questions] == ["0-0", "2-1", "5-0", "7-0", "9-1"]
    assert set(some.windows.question) == set(range(5))
    mixed = json.loads(path.read_text())
    mixed["data"][0]["paragraphs"] += [{**paragraph(77, sentences=9)}]
    path.write_text(json.dumps(mixed))
    short = load_split(path, replace(CONFIG, one_window=True), tokenizer, None)
    assert len(short.questions) == len(short.windows) == 20
    with pytest.raises(ValueError, match=r"no question fits into dataset.max_length=9"):
        load_split(path, replace(CONFIG, one_window=True, max_length=9), tokenizer, None)
    with pytest.raises(ValueError, match="which leaves no room for its paragraph"):
        load_split(path, replace(CONFIG, max_length=8), tokenizer, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda qa: qa.update(answers=[]), "question 0-0 has no answer; the file must be SQuAD v1.1, not v2"),
        (lambda qa: qa["answers"][0].update(answer_start=0), "the answer of question 0-0 is not at its answer_start"),
        (lambda qa: qa.update(id="0-1"), "two questions have the id 0-1"),
        (lambda qa: qa.pop("question"), r"0\.paragraphs\.0\.qas\.0\.question: field required"),
        (lambda qa: qa.update(id=7), r"qas\.0\.id: input should be a valid string"),
        (lambda qa: qa.update(answers=None), r"qas\.0\.answers: input should be a valid list"),
        (lambda qa: qa.update(answers=["x"]), r"qas\.0\.answers\.0: input should be a valid dictionary"),
        (lambda qa: qa["answers"][0].update(answer_start=-1), r"answers\.0\.answer_start: input should be greater"),
        (lambda qa: qa["answers"][0].update(answer_start="0"), r"answers\.0\.answer_start: input should be a valid"),
        (lambda qa: qa["answers"][0].update(answer_start=0.5), r"answers\.0\.answer_start: input should be a valid"),
        (lambda qa: qa["answers"][0].update(answer_start=10**30), "is not at its answer_start"),
        (lambda qa: qa["answers"][0].update(text=""), r"answers\.0\.text: string should have at least 1"),
        (lambda qa: qa["answers"][0].update(text=None), r"answers\.0\.text: input should be a valid string"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = squad_file(tmp_path / "dev.json", 2)
    content = json.loads(path.read_text())
    change(content["data"][0]["paragraphs"][0]["qas"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_squad(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"data": 3}', b'{"data": []}', b'{"data": [[]]}', b"\xff\xfe", b"\0", b"[" * 100_000]
)
def test_files_of_another_kind_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "dev.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"dev\.json (is not in SQuAD's format|contains no question)"):
        read_squad(tmp_path / "dev.json")
