"""SQuAD v1.1: each question refers to a paragraph, and its answer is a span of it (Rajpurkar et al. 2016).

A paragraph that is longer than a network's input is split into windows: [CLS] question [SEP] part of the paragraph
[SEP]. A new window starts every `stride` tokens of the paragraph. Questions are truncated to their first 64 tokens, as
in the published BERT. The target of a window without the answer is the position of [CLS]. Questions and paragraphs are
tokenized once and cached; the cache key is the file and the tokenizer.
"""

import hashlib
import json
import logging
import os
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm
from typing_extensions import TypedDict

from qat_runner.cache import cache_folder
from qat_runner.config import DatasetConfig
from qat_runner.data.array_cache import CacheMissError, Ragged, cache_tokens, key_of, load_arrays
from qat_runner.description import fit
from qat_runner.errors import one_line

FILES = ("train-v1.1.json", "dev-v1.1.json")
QUESTIONS = (87_599, 10_570)
"""Numbers of questions in the official files."""
URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
LONGEST_QUESTION = 64
"""Maximum length of a question in tokens; longer questions are truncated."""
VERSION = 2
"""Version of the tokenization; tokens of another version in the cache are not used."""

log = logging.getLogger("qat_runner")


class Answer(TypedDict):
    """A span of a paragraph. Like the classes below, this is a part of a file in SQuAD's format."""

    text: Annotated[str, Field(min_length=1)]
    answer_start: Annotated[int, Field(ge=0)]


class QuestionAnswers(TypedDict):
    """A question, and answers to it by several people."""

    id: str
    question: str
    answers: list[Answer]


class Paragraph(TypedDict):
    """A text, and questions about it."""

    context: str
    qas: list[QuestionAnswers]


class Article(TypedDict):
    """Paragraphs about one subject."""

    paragraphs: list[Paragraph]


class SquadFile(TypedDict):
    """A whole file."""

    data: list[Article]


@dataclass(frozen=True)
class Question:
    """A question of the file, with its answers and the index of its paragraph."""

    id: str
    text: str
    paragraph: int
    answers: tuple[str, ...]
    start: int
    """index of the first character of the first answer in its paragraph"""


def read_squad(path: Path) -> tuple[list[str], list[Question]]:
    """Read the paragraphs and the questions of a file in SQuAD's format.

    Raises:
        ValueError: the file has another format, a question has no answer, or an answer is not at its answer_start.
    """
    try:
        articles = fit(SquadFile, json.loads(path.read_text(encoding="utf-8")))["data"]
    except RecursionError as error:
        raise ValueError(f"{path.name} is not in SQuAD's format (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not in SQuAD's format ({one_line(error)})") from error
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    contexts = [paragraph["context"] for paragraph in paragraphs]
    questions = [_question(qa, i) for i, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]]
    if not questions:
        raise ValueError(f"{path.name} contains no question")
    seen: set[str] = set()
    for q in questions:
        if q.id in seen:
            raise ValueError(f"{path.name}: two questions have the id {q.id}")
        seen.add(q.id)
        if not contexts[q.paragraph].startswith(q.answers[0], q.start):
            raise ValueError(f"{path.name}: the answer of question {q.id} is not at its answer_start")
    return contexts, questions


def _question(qa: QuestionAnswers, paragraph: int) -> Question:
    if not qa["answers"]:
        raise ValueError(f"question {qa['id']} has no answer; the file must be SQuAD v1.1, not v2")
    answers = tuple(answer["text"] for answer in qa["answers"])
    return Question(qa["id"], qa["question"].strip(), paragraph, answers, qa["answers"][0]["answer_start"])


@dataclass(frozen=True)
class Tokens:
    """The tokens of the texts of a file."""

    questions: Ragged  # token ids, at most LONGEST_QUESTION per question
    contexts: Ragged  # token ids
    spans: Ragged  # first and end character of each token of the contexts, [total, 2]


def tokenize(path: Path, contexts: list[str], questions: list[Question], tokenizer: Any) -> Tokens:
    """Return the tokens of a file, from the cache if possible; otherwise tokenize the texts and cache the tokens.

    Args:
        path: the file of the texts; its content and the tokenizer are the cache key.
        contexts, questions: the result of `read_squad`.
        tokenizer: a fast tokenizer of transformers.
    """
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    key = key_of(VERSION, content, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
    cached = cache_folder() / f"squad_{key}.npz"
    parts = [f.name for f in fields(Tokens)]
    with suppress(CacheMissError):
        arrays = load_arrays(cached)
        return Tokens(*(Ragged.from_arrays(arrays, part) for part in parts))
    with tqdm(
        total=len(contexts) + len(questions),
        desc=f"tokenizing {path.name}",
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        context_ids, spans = _encode(contexts, tokenizer, bar)
        question_ids, _ = _encode([q.text for q in questions], tokenizer, bar)
    tokens = Tokens(
        Ragged.of([ids[:LONGEST_QUESTION] for ids in question_ids]), Ragged.of(context_ids), Ragged.of(spans, (2,))
    )
    ragged: dict[str, Ragged] = {part: getattr(tokens, part) for part in parts}
    cache_tokens(cached, path.name, {key: array for part in parts for key, array in ragged[part].arrays(part).items()})
    return tokens


def _encode(texts: list[str], tokenizer: Any, bar: "tqdm[Any]") -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Return the token ids and character spans of each text, without special tokens."""
    ids: list[list[int]] = []
    spans: list[list[tuple[int, int]]] = []
    for start in range(0, len(texts), 1000):
        chunk = texts[start : start + 1000]
        encoded = tokenizer(
            chunk, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        ids += encoded["input_ids"]
        spans += encoded["offset_mapping"]
        bar.update(len(chunk))
    return ids, spans


@dataclass(frozen=True)
class Windows:
    """Inputs of a network, one window per row: a question and a part of its paragraph, in the order of questions."""

    question: np.ndarray  # int64 [W]
    start: np.ndarray  # int64 [W], index in the paragraph of the first token of the window's part
    length: np.ndarray  # int64 [W], number of tokens of the paragraph
    prefix: np.ndarray  # int64 [W], number of positions before the first token of the paragraph
    answer: np.ndarray  # int64 [W, 2], first and last position of the answer; 0 if the window does not contain it

    def __len__(self) -> int:
        return len(self.question)


def make_windows(tokens: Tokens, questions: Sequence[Question], max_length: int, stride: int) -> Windows:
    """Make all windows of all questions.

    Args:
        tokens: tokens of the same questions and their paragraphs.
        questions: Q questions.
        max_length: number of positions of a window, including [CLS] and both [SEP].
        stride: number of tokens from the start of a window to the start of the next, limited to the number of tokens of
            the paragraph in a window.

    Raises:
        ValueError: a question is so long that no position is left for its paragraph.
    """
    paragraph = np.array([q.paragraph for q in questions])
    prefix = tokens.questions.lengths + 2
    room = max_length - prefix - 1
    if room.min() < 1:
        longest = questions[int(room.argmin())]
        raise ValueError(f"question {longest.id} has {prefix.max() - 2} tokens, which leaves no room for its paragraph")
    total = tokens.contexts.lengths[paragraph]
    step = np.minimum(stride, room)
    count = 1 + -(-np.maximum(total - room, 0) // step)  # the last window reaches the end
    question = np.repeat(np.arange(len(questions)), count)
    nth = np.arange(len(question)) - np.repeat(np.cumsum(count) - count, count)
    start = nth * step[question]
    length = np.minimum(room[question], total[question] - start)
    answer = np.array([_token_span(q, tokens.spans[q.paragraph]) for q in questions])[question] - start[:, None]
    inside = (answer[:, 0] >= 0) & (answer[:, 1] < length)
    answer = np.where(inside[:, None], answer + prefix[question, None], 0)
    return Windows(question, start, length, prefix[question], answer)


def _token_span(question: Question, spans: np.ndarray) -> tuple[int, int]:
    """Return the first and last token of a question's first answer, given the spans of its paragraph [tokens, 2]."""
    end = question.start + len(question.answers[0])
    first = int(np.searchsorted(spans[:, 1], question.start, side="right"))
    last = int(np.searchsorted(spans[:, 0], end, side="left")) - 1
    return first, max(first, last)


@dataclass
class Split:
    """Training or validation split: texts, tokens and windows of the selected questions."""

    contexts: list[str]
    questions: list[Question]
    tokens: Tokens
    windows: Windows


def load_split(path: Path, config: DatasetConfig, tokenizer: Any, limit: int | None) -> Split:
    """Read a file and split it into windows.

    Args:
        path: a file in SQuAD's format.
        config: sets the lengths of windows, and whether questions may need several windows.
        tokenizer: a fast tokenizer of transformers.
        limit: maximum number of questions; None: all.

    Raises:
        ValueError: as `read_squad` and `make_windows`, or no question is left.
    """
    contexts, questions = read_squad(path)
    tokens = tokenize(path, contexts, questions, tokenizer)
    chosen = np.arange(len(questions))
    if config.one_window:
        paragraph = np.array([q.paragraph for q in questions])
        chosen = chosen[tokens.questions.lengths + tokens.contexts.lengths[paragraph] + 3 <= config.max_length]
        if not len(chosen):
            raise ValueError(f"{path.name}: no question fits into dataset.max_length={config.max_length}")
    if limit is not None and limit < len(chosen):  # evenly spaced, because the file is ordered by article
        chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
    if len(chosen) < len(questions):
        questions = [questions[i] for i in chosen.tolist()]
        tokens = replace(tokens, questions=Ragged.of([tokens.questions[i] for i in chosen.tolist()]))
    return Split(contexts, questions, tokens, make_windows(tokens, questions, config.max_length, config.stride))


def prepare_squad(folder: Path) -> None:
    """Download the official files that are missing, and check that all of them are complete.

    Raises:
        ValueError: a file is not the official one; the message names it, and it is not deleted.
        OSError: the download failed.
    """
    for name, count in zip(FILES, QUESTIONS, strict=True):
        path = folder / name
        if not path.is_file():
            print(f"downloading {URL}{name}")
            temporary = path.with_suffix(".part")
            urllib.request.urlretrieve(URL + name, temporary)
            os.replace(temporary, path)
        found = len(read_squad(path)[1])
        if found != count:
            raise ValueError(f"{path} contains {found} questions; the official file contains {count}")


def holds_squad(folder: Path) -> bool:
    """Return whether a folder contains both files."""
    return all((folder / name).is_file() for name in FILES)
