"""SQuAD v1.1: questions on a paragraph each, whose answer is a span of it (Rajpurkar et al. 2016).

A paragraph longer than a network's input is read through windows: [CLS] question [SEP] part of the paragraph [SEP],
a window every `stride` tokens of the paragraph, and of a question no more than its first 64 tokens, as BERT was
published with. A window without the answer is taught to point at [CLS]. Questions are tokenized once, and kept in a
cache that is keyed by the file and the tokenizer.
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
from qat_runner.data.kept import Ragged, UnkeptError, keep_tokens, kept_arrays, key_of
from qat_runner.description import fit
from qat_runner.errors import told

FILES = ("train-v1.1.json", "dev-v1.1.json")
QUESTIONS = (87_599, 10_570)
"""In the official files."""
URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
LONGEST_QUESTION = 64
"""In tokens; the rest is cut off."""
VERSION = 2
"""Of how texts are made tokens: those of another one in the cache are not used."""

log = logging.getLogger("qat_runner")


class Answer(TypedDict):
    """A span of a paragraph, as a file in SQuAD's format has it; like all below."""

    text: Annotated[str, Field(min_length=1)]
    answer_start: Annotated[int, Field(ge=0)]


class QuestionAnswers(TypedDict):
    """A question, and its answers by several people."""

    id: str
    question: str
    answers: list[Answer]


class Paragraph(TypedDict):
    """A text, and questions on it."""

    context: str
    qas: list[QuestionAnswers]


class Article(TypedDict):
    """Paragraphs on one thing."""

    paragraphs: list[Paragraph]


class SquadFile(TypedDict):
    """A whole file."""

    data: list[Article]


@dataclass(frozen=True)
class Question:
    """A question as the file has it."""

    id: str
    text: str
    paragraph: int
    answers: tuple[str, ...]
    start: int
    """first character of the first answer in its paragraph"""


def read_squad(path: Path) -> tuple[list[str], list[Question]]:
    """The paragraphs and the questions of a file in SQuAD's format.

    Raises:
        ValueError: it is something else, a question has no answer, or an answer is not where it is said to be.
    """
    try:
        articles = fit(SquadFile, json.loads(path.read_text(encoding="utf-8")))["data"]
    except RecursionError as error:
        raise ValueError(f"{path.name} is not in SQuAD's format (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not in SQuAD's format ({told(error)})") from error
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    contexts = [paragraph["context"] for paragraph in paragraphs]
    questions = [_question(qa, i) for i, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]]
    if not questions:
        raise ValueError(f"{path.name} holds no question")
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
        raise ValueError(f"question {qa['id']} has no answer: SQuAD v1.1 is wanted, not v2")
    answers = tuple(answer["text"] for answer in qa["answers"])
    return Question(qa["id"], qa["question"].strip(), paragraph, answers, qa["answers"][0]["answer_start"])


@dataclass(frozen=True)
class Tokens:
    """A file's texts as tokens."""

    questions: Ragged  # ids, of each at most LONGEST_QUESTION
    contexts: Ragged  # ids
    spans: Ragged  # first and end character of each token of the contexts, [total, 2]


def tokenize(path: Path, contexts: list[str], questions: list[Question], tokenizer: Any) -> Tokens:
    """The tokens of a file, from the cache or for the cache.

    Args:
        path: the file that the texts are from; its content and the tokenizer are the key.
        contexts, questions: what `read_squad` gave.
        tokenizer: a fast one of transformers.
    """
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    key = key_of(VERSION, content, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
    cached = cache_folder() / f"squad_{key}.npz"
    parts = [f.name for f in fields(Tokens)]
    with suppress(UnkeptError):
        arrays = kept_arrays(cached)
        return Tokens(*(Ragged.kept(arrays, part) for part in parts))
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
    keep_tokens(cached, path.name, {key: array for part in parts for key, array in ragged[part].arrays(part).items()})
    return tokens


def _encode(texts: list[str], tokenizer: Any, bar: "tqdm[Any]") -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids and character spans of each text, without special tokens."""
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
    """Inputs of a network, each a question and a part of its paragraph; a row each, in the order of questions."""

    question: np.ndarray  # int64 [W]
    start: np.ndarray  # int64 [W], the first token of the paragraph
    length: np.ndarray  # int64 [W], tokens of the paragraph
    prefix: np.ndarray  # int64 [W], positions before the first token of the paragraph
    answer: np.ndarray  # int64 [W, 2], positions of the answer's ends; 0 where the window does not hold it

    def __len__(self) -> int:
        return len(self.question)


def make_windows(tokens: Tokens, questions: Sequence[Question], max_length: int, stride: int) -> Windows:
    """All windows of all questions.

    Args:
        tokens: of the same questions.
        questions: Q of them.
        max_length: positions of a window, [CLS] and both [SEP] included.
        stride: tokens from the start of a window to that of the next; no more than its part of the paragraph.

    Raises:
        ValueError: a question leaves no room for its paragraph.
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
    """First and last token, in the paragraph [tokens, 2], of a question's first answer."""
    end = question.start + len(question.answers[0])
    first = int(np.searchsorted(spans[:, 1], question.start, side="right"))
    last = int(np.searchsorted(spans[:, 0], end, side="left")) - 1
    return first, max(first, last)


@dataclass
class Split:
    """Training or validation split: texts, tokens and windows of the chosen questions."""

    contexts: list[str]
    questions: list[Question]
    tokens: Tokens
    windows: Windows


def load_split(path: Path, config: DatasetConfig, tokenizer: Any, limit: int | None) -> Split:
    """Read a file and cut it into windows.

    Args:
        path: a file in SQuAD's format.
        config: lengths of windows, and whether questions may need several.
        tokenizer: a fast one of transformers.
        limit: at most so many questions; None: all.

    Raises:
        ValueError: as `read_squad` and `make_windows`; or no question is left.
    """
    contexts, questions = read_squad(path)
    tokens = tokenize(path, contexts, questions, tokenizer)
    chosen = np.arange(len(questions))
    if config.one_window:
        paragraph = np.array([q.paragraph for q in questions])
        chosen = chosen[tokens.questions.lengths + tokens.contexts.lengths[paragraph] + 3 <= config.max_length]
        if not len(chosen):
            raise ValueError(f"{path.name}: no question fits into dataset.max_length={config.max_length}")
    if limit is not None and limit < len(chosen):  # evenly over the file, which goes from article to article
        chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
    if len(chosen) < len(questions):
        questions = [questions[i] for i in chosen.tolist()]
        tokens = replace(tokens, questions=Ragged.of([tokens.questions[i] for i in chosen.tolist()]))
    return Split(contexts, questions, tokens, make_windows(tokens, questions, config.max_length, config.stride))


def prepare_squad(folder: Path) -> None:
    """Download what is not there yet of the official files, and check that they are whole.

    Raises:
        ValueError: a file is not the official one; it is named, and left where it is.
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
            raise ValueError(f"{path} holds {found} questions, the official file {count}")


def holds_squad(folder: Path) -> bool:
    """Whether a folder holds both files."""
    return all((folder / name).is_file() for name in FILES)
