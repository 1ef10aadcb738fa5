"""Language modelling: predict the next token at every position of a text, as decoders are trained."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.allocation import Objective, distribution_objective, divergence
from qat_runner.config import Config
from qat_runner.config.tasks import FACTS
from qat_runner.data.plain_text import TextData
from qat_runner.models import DECODERS, build_decoder, read_decoder, tokenizer_for
from qat_runner.tasks.task import Task
from qat_runner.tasks.texts import check_length, checkpoint_of
from qat_runner.tasks.totals import Totals

LARGEST_LOG = 700.0
"""Upper limit of the loss whose exponential is reported as the perplexity; beyond it, the exponential overflows."""


class LanguageModelling(Task[TextData]):
    """Language modelling: from blocks of L tokens to logits [N, L, V] of the token after each.

    Targets are int64 [N, L]. The metric is perplexity; lower is better.
    """

    name = "language_modelling"
    facts = FACTS[name]
    networks = DECODERS
    unit = "block"
    inputs = ("input_ids",)
    outputs = ("logits",)

    def check(self, config: Config) -> None:
        super().check(config)
        check_length(config, getattr(read_decoder(checkpoint_of(config)), "max_position_embeddings", None))

    def tokenizer(self, config: Config) -> Any:
        return None if config.model.checkpoint is None else tokenizer_for(config.model.checkpoint)

    def network(self, config: Config, data: TextData | None, pretrained: bool = False) -> nn.Module:
        return build_decoder(checkpoint_of(config), pretrained)

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy, averaged over all tokens."""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=label_smoothing)

    def distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the divergence between the distributions of the next token, averaged over all tokens."""
        return divergence(logits, teacher, temperature, dim=-1)

    def objective(self) -> Objective:
        return distribution_objective(lambda model, batch: self.compute(model, batch.inputs), dim=-1)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the most likely next token at each position, int64 [N * L]."""
        return logits.argmax(-1).flatten()

    def totals(self, device: torch.device) -> Totals:
        return TokenTotals(device)

    def score(self, data: TextData) -> Totals:
        return Perplexity(data.device)

    def longest(self, config: Config) -> int:
        return config.dataset.max_length


class TokenTotals(Totals):
    """`Totals` of the loss and of the accuracy of the most likely token, in which all tokens have the same weight.

    The weight of a token does not depend on its batch. `sums` is [4]: loss, hits, samples, tokens.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, ("accuracy",), lambda logits, targets: [(logits.argmax(-1) == targets).sum()])
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        losses, hits, samples, tokens = self.sums
        losses += loss.detach().float() * targets.numel()
        hits += self.hits(logits, targets)[0]
        samples += len(targets)
        tokens += targets.numel()

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        loss, hits, samples, tokens = sums
        return {"loss": loss / max(tokens, 1), "accuracy": 100 * hits / max(tokens, 1), "samples": samples}


class Perplexity(TokenTotals):
    """`TokenTotals` of a pass whose loss is the plain cross entropy; `read` also returns its perplexity."""

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        figures = super().figures(sums)
        return figures | {"perplexity": math.exp(min(figures["loss"], LARGEST_LOG))}
