"""Answers decoded from logits and their scores, compared with step-by-step reference implementations."""

import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_runner.config import DatasetConfig
from qat_runner.data import Delivery
from qat_runner.data.sets.squad import read
from qat_runner.data.squad import Split
from qat_runner.data.windows import SquadData
from qat_runner.models import load_tokenizer
from qat_runner.tasks.answers import decode, exact_match, f1
from qat_runner.tasks.question_answering import QuestionAnswering
from tests.splits import SPLITS
from tests.tiny import PLACES, tiny_bert, tiny_squad


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SquadData:
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    delivery = Delivery(torch.device("cpu"), seed=3, tokenizer=load_tokenizer(str(tiny_bert(tmp_path / "bert"))))
    settings = DatasetConfig(name="squad", task="question_answering", max_length=32, stride=8, val_batch_size=4)
    return read(tiny_squad(tmp_path / "squad"), settings, delivery)


def brute_force(logits: Tensor, split: Split, n_best: int, longest: int) -> dict[str, str]:
    """The algorithm of BERT's reference implementation on SQuAD, with loops over windows, starts and ends."""
    w, best = split.windows, {}
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
                    best[q] = score, split.contexts[q][a + shift : b + shift + 1]
    return {split.questions[q].id: text for q, (_, text) in best.items()}


@given(SPLITS, st.integers(1, 8), st.integers(1, 10), st.integers(0, 1000))
def test_answers_are_those_of_brute_force(split: Split, n_best: int, longest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = int((split.windows.prefix + split.windows.length).max()) + 1
    logits = torch.randn(len(split.windows), width, 2, generator=generator)
    assert decode(logits, split, n_best, longest) == brute_force(logits, split, n_best, longest)


class Official:
    """The rules of SQuAD's evaluate-v1.1.py, implemented step by step."""

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
    score = QuestionAnswering().score(data)
    torch.manual_seed(0)
    for batch in data.val_batches(4, seen):
        logits = torch.randn(batch.size, batch.inputs[0].shape[1], 2)
        held = (batch.targets[:, 0] > 0) & (torch.rand(batch.size) < 0.7)  # some right, some wrong
        for end in (0, 1):
            logits[held, batch.targets[held, end], end] += 20
        score.add(torch.tensor(1.5), logits, batch.targets)
    figures = score.read()
    gold = {q.id: list(q.answers) for q in data.validation.questions}
    assert score.predictions is not None
    assert (figures["em"], figures["f1"]) == pytest.approx(Official.score(gold, score.predictions), rel=1e-12)
    assert figures["loss"] == 1.5
    assert 0 < figures["em"] <= figures["f1"] <= 100
    if seen is None:
        assert list(score.predictions) == [q.id for q in data.validation.questions]


def test_perfect_logits_find_every_answer(data: SquadData) -> None:
    score = QuestionAnswering().score(data)
    for batch in data.val_batches(4):
        logits = torch.zeros(batch.size, batch.inputs[0].shape[1], 2)
        for end in (0, 1):
            logits[torch.arange(batch.size), batch.targets[:, end], end] = 9.0
        score.add(torch.tensor(0.0), logits, batch.targets)
    assert score.read() == {"loss": 0.0, "em": 100.0, "f1": 100.0, "samples": data.val_size}
    assert score.predictions is not None
    assert set(score.predictions.values()) <= {place.capitalize() for place in PLACES}
    assert QuestionAnswering().score(data).read()["f1"] == 0.0  # no window seen
