"""Extractive question answering: predict the first and the last token of the answer among the tokens of a window."""

import itertools
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner import distributed
from qat_runner.config import Config
from qat_runner.config.tasks import FACTS
from qat_runner.data.squad import Split
from qat_runner.data.windows import SquadData
from qat_runner.models import BERTS, build_bert, load_tokenizer, read_checkpoint
from qat_runner.tasks.answers import decode, exact_match, f1
from qat_runner.tasks.task import Choice
from qat_runner.tasks.texts import check_length, checkpoint_of
from qat_runner.tasks.totals import Totals, top_five

WINDOW_HITS = ("exact", "exact5")
"""Names of the metrics of single windows: start and end are both right; both are among the five highest logits."""


class QuestionAnswering(Choice[SquadData]):
    """Question answering: from windows of L tokens to logits [N, L, 2] for the start and the end of the answer.

    The metric is the F1 of the answers.
    """

    name = "question_answering"
    facts = FACTS[name]
    networks = BERTS
    unit = "win"
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    outputs = ("start_logits", "end_logits")

    def check(self, config: Config) -> None:
        super().check(config)
        check_length(config, read_checkpoint(checkpoint_of(config)).max_position_embeddings)

    def tokenizer(self, config: Config) -> Any:
        return None if config.model.checkpoint is None else load_tokenizer(config.model.checkpoint)

    def network(self, config: Config, data: SquadData | None, pretrained: bool = False) -> nn.Module:
        return build_bert(checkpoint_of(config), pretrained)

    def totals(self, device: torch.device) -> Totals:
        return Totals(device, WINDOW_HITS, top_five)

    def score(self, data: SquadData) -> "AnswerScore":
        return AnswerScore(
            data.device,
            WINDOW_HITS,
            top_five,
            split=data.validation,
            n_best=data.config.n_best,
            max_answer_length=data.config.max_answer_length,
        )

    def longest(self, config: Config) -> int:
        return config.dataset.max_length


@dataclass
class AnswerScore(Totals):
    """`Totals` of a pass over the validation windows that also decodes and scores the answers.

    The pass can stop early: `read` returns em and f1, in percent, over the questions with at least one window so far.
    """

    split: Split = field(kw_only=True)
    n_best: int = field(kw_only=True)
    max_answer_length: int = field(kw_only=True)
    logits: list[Tensor] = field(default_factory=list, init=False)
    """logits of each batch, [N, L, 2]"""

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        super().add(loss, logits, targets)
        self.logits.append(logits.float())

    def merged(self) -> Self:
        everyone = super().merged()
        gathered = distributed.all_gather([part.cpu() for part in self.logits])  # batches are shared round robin
        rounds = itertools.zip_longest(*gathered)
        everyone.logits = [part for parts in rounds for part in parts if part is not None]
        return everyone

    def read(self) -> dict[str, float]:
        figures = self.figures(self.sums.tolist())
        self.predictions = {}
        if not self.logits:
            return {"loss": 0.0, "em": 0.0, "f1": 0.0, "samples": 0}
        width = max(part.shape[1] for part in self.logits)
        padded = [F.pad(part, (0, 0, 0, width - part.shape[1]), value=-torch.inf) for part in self.logits]
        self.predictions = decode(torch.cat(padded).cpu(), self.split, self.n_best, self.max_answer_length)
        gold = {q.id: list(q.answers) for q in self.split.questions}
        pairs = [(text, gold[key]) for key, text in self.predictions.items()]
        return {
            "loss": figures["loss"],
            "em": 100 * sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "f1": 100 * sum(f1(*pair) for pair in pairs) / len(pairs),
            "samples": figures["samples"],
        }
