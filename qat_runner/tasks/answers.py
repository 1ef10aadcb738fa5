"""Decode the logits of windows to answers, and score them by exact match and F1 of SQuAD v1.1."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qat_runner.data.squad import Split, Windows

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, gold: Sequence[str]) -> bool:
    """Return whether an answer has the same words as a gold answer, by the rules of SQuAD's evaluate-v1.1.py.

    Args:
        answer: the predicted answer.
        gold: the gold answers, one or more.
    """
    return any(_words(answer) == _words(text) for text in gold)


def f1(answer: str, gold: Sequence[str]) -> float:
    """Return the F1 (harmonic mean of precision and recall) of an answer's words, for the best gold answer.

    As in SQuAD's evaluate-v1.1.py, F1 is 0 if the answers have no word in common, even if neither has any word: "the"
    and "a" are an exact match, but their F1 is 0. Common libraries implement the rule of SQuAD v2 instead, where an
    empty answer can be right.

    Args:
        answer: the predicted answer.
        gold: the gold answers, one or more.

    Returns:
        F1, 0 to 1.
    """
    return max(_f1(Counter(_words(answer)), Counter(_words(text))) for text in gold)


def _f1(answer: Counter[str], gold: Counter[str]) -> float:
    common = (answer & gold).total()
    return 2 * common / (answer.total() + gold.total()) if common else 0.0


def _words(text: str) -> list[str]:
    """Return the words that count: in lower case, without ASCII punctuation and English articles."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def decode(logits: Tensor, split: Split, n_best: int, max_answer_length: int) -> dict[str, str]:
    """Return the answer of each question: the best span in any of its windows.

    Start and end must be among the `n_best` positions of their window that lie in the paragraph. A start counts only in
    the window in which it has the most context, as in the reference implementation of BERT. (The reference takes the
    `n_best` of all positions and then drops those outside the paragraph, so it has fewer spans to choose from.)

    Args:
        logits: [n, L, 2], start and end logits of the first n windows.
        split: texts, tokens and windows.
        n_best: number of candidates for the start, and for the end.
        max_answer_length: maximum length of an answer in tokens.

    Returns:
        A dict from question id to answer, for all questions of those windows; "" where no span is possible.
    """
    windows, n = split.windows, len(logits)
    place = np.arange(logits.shape[1])
    inside = torch.from_numpy(_inside(windows, n, place))
    may_start = inside & torch.from_numpy(_most_context(windows, n, place))
    k = min(n_best, len(place))
    starts, first = logits[..., 0].masked_fill(~may_start, -torch.inf).topk(k, dim=1)
    ends, last = logits[..., 1].masked_fill(~inside, -torch.inf).topk(k, dim=1)
    length = last[:, None, :] - first[:, :, None]  # [n, k, k]
    scores = starts[:, :, None] + ends[:, None, :]
    scores = scores.masked_fill((length < 0) | (length >= max_answer_length), -torch.inf).flatten(1)
    best, which = scores.max(dim=1)
    chosen = torch.stack([first.gather(1, which[:, None] // k)[:, 0], last.gather(1, which[:, None] % k)[:, 0]], dim=1)
    found: dict[int, tuple[float, str]] = {}
    for row, (score, (begin, end)) in enumerate(zip(best.tolist(), chosen.tolist(), strict=True)):
        question = int(windows.question[row])
        if question not in found or score > found[question][0]:
            found[question] = score, _text(split, row, begin, end) if score > -np.inf else ""
    return {split.questions[question].id: text for question, (_, text) in found.items()}


def _text(split: Split, row: int, begin: int, end: int) -> str:
    windows = split.windows
    paragraph = split.questions[windows.question[row]].paragraph
    token = windows.start[row] - windows.prefix[row]
    spans = split.tokens.spans[paragraph]
    first, last = int(spans[token + begin, 0]), int(spans[token + end, 1])
    text: str = split.contexts[paragraph][first:last]
    return text


def _inside(windows: Windows, n: int, place: np.ndarray) -> np.ndarray:
    """Return whether each position is a token of the paragraph, bool [n, L]."""
    prefix = windows.prefix[:n, None]
    inside: np.ndarray = (place >= prefix) & (place < prefix + windows.length[:n, None])
    return inside


def _most_context(windows: Windows, n: int, place: np.ndarray) -> np.ndarray:
    """Return whether no other window of the question has more context for the token of a position, bool [n, L]."""
    token = windows.start[:n, None] + place - windows.prefix[:n, None]
    own = _context(windows.start[:n, None], windows.length[:n, None], token)
    most = np.ones(token.shape, dtype=bool)
    for distance in range(1, int(np.bincount(windows.question).max())):
        for other, beats in ((-distance, np.greater_equal), (distance, np.greater)):  # ties: the first window counts
            row = np.arange(n) + other
            exists = (row >= 0) & (row < len(windows))
            row = np.where(exists, row, 0)
            exists &= windows.question[row] == windows.question[:n]
            theirs = _context(windows.start[row, None], windows.length[row, None], token)
            most &= ~(exists[:, None] & beats(theirs, own))
    return most


def _context(start: np.ndarray, length: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Return the context of a token in a window: the number of tokens on the shorter side, or -1 outside the window.

    At equal numbers, a longer window counts as more context.
    """
    shorter = np.minimum(token - start, start + length - 1 - token)
    return np.where(shorter >= 0, shorter + 0.01 * length, -1.0)
