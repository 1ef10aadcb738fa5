import json
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_runner.config import DatasetConfig
from qat_runner.data import squad
from qat_runner.data.answers import AnswerScore, decode, exact_match, f1
from qat_runner.data.question_answering import SquadData, load_squad
from qat_runner.data.squad import Half, Question, Ragged, Tokens, load_half, make_windows, read_squad
from qat_runner.models import load_tokenizer
from tests.tiny import PLACES, paragraph, squad_file, tiny_bert, tiny_squad

CPU = torch.device("cpu")
CONFIG = DatasetConfig(name="squad", max_length=32, stride=8, val_batch_size=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny_bert(tmp_path_factory.mktemp("bert"))))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> SquadData:
    return load_squad(tiny_squad(tmp_path / "squad"), CONFIG, tokenizer, CPU, seed=3)


def half(lengths: list[tuple[int, int]], max_length: int, stride: int) -> Half:
    """Questions of so many tokens on paragraphs of so many tokens; each token of a paragraph is one character."""
    contexts = ["".join(chr(97 + k % 26) for k in range(n)) for _, n in lengths]
    questions = [Question(str(i), "", i, (contexts[i][n // 2],), n // 2) for i, (_, n) in enumerate(lengths)]
    tokens = Tokens(
        Ragged.of([range(q) for q, _ in lengths]),
        Ragged.of([range(n) for _, n in lengths]),
        Ragged.of([[(k, k + 1) for k in range(n)] for _, n in lengths], (2,)),
    )
    return Half(contexts, questions, tokens, make_windows(tokens, questions, max_length, stride))


HALVES = st.builds(
    half,
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(12, 24),
    st.integers(1, 30),
)


@given(HALVES)
def test_windows_cover_each_paragraph_in_order(half: Half) -> None:
    w = half.windows
    assert (np.diff(w.question) >= 0).all()
    for i, question in enumerate(half.questions):
        rows = np.flatnonzero(w.question == i)
        total = len(half.contexts[i])
        covered = set().union(*(range(w.start[r], w.start[r] + w.length[r]) for r in rows))
        assert covered == set(range(total))
        assert (w.start[rows] + w.length[rows] == total).sum() == 1  # none after the one that reaches the end
        for r in rows:
            inside = w.start[r] <= question.start < w.start[r] + w.length[r]
            position = w.prefix[r] + question.start - w.start[r]
            assert w.answer[r].tolist() == ([position, position] if inside else [0, 0])


def brute_force(logits: Tensor, half: Half, n_best: int, longest: int) -> dict[str, str]:
    """The reference implementation of BERT on SQuAD, in words: loops over windows, starts and ends."""
    w, best = half.windows, {}
    for r in range(len(logits)):
        q = int(w.question[r])
        best.setdefault(q, (-np.inf, ""))
        places = range(int(w.prefix[r]), int(w.prefix[r] + w.length[r]))

        def context(row: int, token: int) -> float:
            left, right = token - w.start[row], w.start[row] + w.length[row] - 1 - token
            return min(left, right) + 0.01 * w.length[row] if min(left, right) >= 0 else -1.0

        def most(place: int, r: int = r, q: int = q) -> bool:
            token = int(w.start[r] + place - w.prefix[r])
            rows = np.flatnonzero(w.question == q).tolist()
            return bool(max(rows, key=lambda row: (context(row, token), -row)) == r)

        starts = sorted(filter(most, places), key=lambda p: -logits[r, p, 0].item())[:n_best]
        ends = sorted(places, key=lambda p: -logits[r, p, 1].item())[:n_best]
        for a in starts:
            for b in ends:
                score = (logits[r, a, 0] + logits[r, b, 1]).item()
                if a <= b < a + longest and score > best[q][0]:
                    shift = int(w.start[r] - w.prefix[r])
                    best[q] = score, half.contexts[q][a + shift : b + shift + 1]
    return {half.questions[q].id: text for q, (_, text) in best.items()}


@given(HALVES, st.integers(1, 8), st.integers(1, 10), st.integers(0, 1000))
def test_answers_are_those_of_brute_force(half: Half, n_best: int, longest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = int((half.windows.prefix + half.windows.length).max()) + 1
    logits = torch.randn(len(half.windows), width, 2, generator=generator)
    assert decode(logits, half, n_best, longest) == brute_force(logits, half, n_best, longest)


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


class Official:
    """The rules of SQuAD's evaluate-v1.1.py, written down step by step."""

    @staticmethod
    def normal(text: str) -> str:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    @staticmethod
    def f1(answer: str, gold: str) -> float:
        left, right = Official.normal(answer).split(), Official.normal(gold).split()
        same = 0
        rest = list(right)
        for word in left:
            if word in rest:
                rest.remove(word)
                same += 1
        if same == 0:
            return 0.0
        precision, recall = same / len(left), same / len(right)
        return 2 * precision * recall / (precision + recall)

    @staticmethod
    def score(gold: dict[str, list[str]], predictions: dict[str, str]) -> tuple[float, float]:
        """EM and F1, in percent."""
        em = f1 = 0.0
        for key, text in predictions.items():
            em += max(Official.normal(text) == Official.normal(g) for g in gold[key])
            f1 += max(Official.f1(text, g) for g in gold[key])
        return 100 * em / len(predictions), 100 * f1 / len(predictions)


PIECES = [
    "a",
    "an",
    "The",
    "THE",
    "theatre",
    "cat",
    "Cat",
    "1,000",
    "1000",
    "3.5",
    "-",
    "!?",
    "'s",
    "£5",
    "É",
    "İ",
    "–",
    "a–n",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=5).flatmap(
    lambda pieces: st.sampled_from([" ", "", "\u00a0", "\n"]).map(lambda gap: gap.join(pieces))
)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=400)
@example("", ["the"])
@example("the", ["a", "An"])
@example("!", ["?"])
@example("", ["cat"])
@example("The  cat.", ["a dog", "cat"])
@example("cat cat dog", ["cat dog dog"])
def test_scores_are_those_of_version_one(answer: str, gold: list[str]) -> None:
    expected = Official.score({"q": gold}, {"q": answer})
    assert (100 * exact_match(answer, gold), 100 * f1(answer, gold)) == pytest.approx(expected, rel=1e-12)


def test_words_that_all_fall_away_match_exactly_but_have_no_f1() -> None:
    for answer, gold in (("the", "a"), ("", "an"), ("!", "?"), ("", "")):
        assert exact_match(answer, [gold]) and f1(answer, [gold]) == 0
    assert exact_match("the", ["cat", "a"]) and f1("cat", ["the", "a cat"]) == 1
    assert not exact_match("", ["cat"]) and f1("", ["cat"]) == 0
    assert f1("cat cat dog", ["cat dog dog"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("seen", [1, 3, None])
def test_score_over_all_windows_seen_is_the_official_one(data: SquadData, seen: int | None) -> None:
    score = data.score()
    torch.manual_seed(0)
    for batch in data.val_batches(4, seen):
        logits = torch.randn(batch.size, batch.inputs[0].shape[1], 2)
        held = (batch.targets[:, 0] > 0) & (torch.rand(batch.size) < 0.7)  # some right, some wrong
        for end in (0, 1):
            logits[held, batch.targets[held, end], end] += 20
        score.add(torch.tensor(1.5), logits, batch.targets)
    figures = score.read()
    gold = {q.id: list(q.answers) for q in data.validation.questions}
    assert (figures["em"], figures["f1"]) == pytest.approx(Official.score(gold, score.predictions), rel=1e-12)
    assert figures["loss"] == 1.5
    assert 0 < figures["em"] <= figures["f1"] <= 100
    if seen is None:
        assert list(score.predictions) == [q.id for q in data.validation.questions]


def test_perfect_logits_find_every_answer(data: SquadData) -> None:
    score = data.score()
    for batch in data.val_batches(4):
        logits = torch.zeros(batch.size, batch.inputs[0].shape[1], 2)
        for end in (0, 1):
            logits[torch.arange(batch.size), batch.targets[:, end], end] = 9.0
        score.add(torch.tensor(0.0), logits, batch.targets)
    assert score.read() == {"loss": 0.0, "em": 100.0, "f1": 100.0, "samples": data.val_size}
    assert set(score.predictions.values()) <= {place.capitalize() for place in PLACES}
    assert isinstance(score, AnswerScore)
    assert data.score().read()["f1"] == 0.0  # nothing seen


def test_tokens_come_from_the_cache(
    tmp_path: Path, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = squad_file(tmp_path / "dev.json", 4)
    first = load_half(path, CONFIG, tokenizer, None)
    (kept,) = cache.glob("squad_*.npz")
    called: list[str] = []
    encode = squad._encode
    monkeypatch.setattr(squad, "_encode", lambda *args: (called.append("x"), encode(*args))[1])
    again = load_half(path, CONFIG, tokenizer, None)
    assert not called
    assert np.array_equal(first.windows.answer, again.windows.answer)
    for content in (kept.read_bytes()[:100], b""):  # damaged: made anew
        kept.write_bytes(content)
        assert np.array_equal(load_half(path, CONFIG, tokenizer, None).tokens.spans.values, first.tokens.spans.values)
    assert len(called) == 4
    load_half(squad_file(path, 5), CONFIG, tokenizer, None)  # another file
    assert len(called) == 6
    assert len([*cache.iterdir()]) == 2


def test_a_part_of_the_questions(tmp_path: Path, tokenizer: Any) -> None:
    path = squad_file(tmp_path / "dev.json", 10)
    some = load_half(path, CONFIG, tokenizer, 5)
    assert [q.id for q in some.questions] == ["0-0", "2-1", "5-0", "7-0", "9-1"]
    assert set(some.windows.question) == set(range(5))
    mixed = json.loads(path.read_text())
    mixed["data"][0]["paragraphs"] += [{**paragraph(77, sentences=9)}]
    path.write_text(json.dumps(mixed))
    short = load_half(path, replace(CONFIG, one_window=True), tokenizer, None)
    assert len(short.questions) == len(short.windows) == 20
    with pytest.raises(ValueError, match=r"no question fits into dataset.max_length=9"):
        load_half(path, replace(CONFIG, one_window=True, max_length=9), tokenizer, None)
    with pytest.raises(ValueError, match="which leaves no room for its paragraph"):
        load_half(path, replace(CONFIG, max_length=8), tokenizer, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda qa: qa.update(answers=[]), "question 0-0 has no answer: SQuAD v1.1 is wanted, not v2"),
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
    with pytest.raises(ValueError, match=r"dev\.json (is not in SQuAD's format|holds no question)"):
        read_squad(tmp_path / "dev.json")
