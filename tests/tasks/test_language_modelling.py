"""Loss, distance and perplexity of a language model, compared with their definitions."""

import math

import pytest
import torch
from torch import Tensor

from qat_runner.config.tasks import Measure
from qat_runner.tasks import TASKS
from qat_runner.tasks.language_modelling import Perplexity

TASK = TASKS["language_modelling"]


def surprise(logits: Tensor, targets: Tensor) -> list[float]:
    """The negative log-likelihood of each token in nats, computed from its definition in float64."""
    found = []
    for row, target in zip(logits.double().flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        top = max(row)
        found.append(math.log(sum(math.exp(v - top) for v in row)) + top - row[target])
    return found


def test_loss_is_the_mean_surprise_of_the_tokens() -> None:
    logits, targets = 5 * torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    expected = surprise(logits, targets)
    assert TASK.loss(logits, targets).item() == pytest.approx(sum(expected) / 21, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distance_is_the_divergence_per_token(temperature: float) -> None:
    logits, teacher = 3 * torch.randn(2, 5, 9), 3 * torch.randn(2, 5, 9)
    p, q = (torch.exp(t.double() / temperature) for t in (teacher, logits))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    logits.requires_grad_()
    found = TASK.distance(logits, teacher, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()  # T^2 KL: the gradient is T (q - p) per token
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), temperature * (q - p) / 10, rtol=1e-4, atol=1e-7)
    assert TASK.distance(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_perplexity_counts_every_token_once_whatever_the_batches() -> None:
    score, all_nats, hits = Perplexity(torch.device("cpu")), [], 0
    for shape in ((4, 8), (1, 3)):
        logits, targets = 2 * torch.randn(*shape, 6), torch.randint(0, 6, shape)
        score.add(TASK.loss(logits, targets), logits, targets)
        all_nats += surprise(logits, targets)
        hits += int((logits.argmax(-1) == targets).sum())
    figures = score.read()
    assert figures["perplexity"] == pytest.approx(math.exp(sum(all_nats) / 35), rel=1e-6)
    assert figures["accuracy"] == pytest.approx(100 * hits / 35)
    assert figures["samples"] == 5


def test_parts_that_processes_have_add_up() -> None:
    whole, *parts = (Perplexity(torch.device("cpu")) for _ in range(3))
    for number, shape in enumerate(((4, 8), (4, 8), (1, 3))):
        logits, targets = torch.randn(*shape, 6), torch.randint(0, 6, shape)
        for score in (whole, parts[number % 2]):
            score.add(TASK.loss(logits, targets), logits, targets)
    together = parts[0].figures((parts[0].sums + parts[1].sums).tolist())
    assert together == pytest.approx(whole.read())


def test_a_perplexity_beyond_all_numbers_is_one_all_the_same() -> None:
    score = Perplexity(torch.device("cpu"))
    score.add(torch.tensor(1e6), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
    assert math.isfinite(score.read()["perplexity"])


def test_how_figures_are_read() -> None:
    less, more = TASK.facts.measure, Measure("f1")
    assert less.better(3.0, 4.0) and not less.better(4.0, 4.0) and less.better(1e9, less.worst)
    assert more.better(4.0, 3.0) and not more.better(4.0, 4.0) and more.better(0.0, more.worst)
    assert (less.best([3, 1, 2]), more.best([3, 1, 2])) == (1, 3)
    assert (less.describe(21.5), more.describe(21.5)) == ("21.50", "21.50 %")
    assert (less.head, more.head) == ("perplexity", "f1 %")
    assert (less.title, more.title) == ("Perplexity (lower is better)", "Accuracy (%)")
