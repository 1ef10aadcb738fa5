import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_runner.data import Batch
from qat_runner.insertion import quantize_model
from qat_runner.tasks import TASKS
from qat_runner.training.measure import evaluate

CPU = torch.device("cpu")
TASK = TASKS["classification"]


def network() -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 7)
    )
    return quantize_model(layers, bits=4, example=torch.randn(2, 3, 8, 8))


def batches(*sizes: int) -> list[Batch]:
    return [Batch((torch.randn(n, 3, 8, 8),), torch.randint(0, 7, (n,))) for n in sizes]


def test_evaluation_over_uneven_batches() -> None:
    model, data = network(), batches(10, 10, 3)
    totals = TASK.totals(CPU)
    evaluate(TASK, model, data, totals, "none")
    result = totals.read()
    logits = torch.cat([model(x) for (x,), _ in data]).detach()
    labels = torch.cat([y for _, y in data])
    assert result["samples"] == 23
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    hits = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert result["top5"] == pytest.approx(100 * hits)


def test_autocast_changes_the_precision() -> None:
    model, data = network(), batches(4)
    totals = {amp: TASK.totals(CPU) for amp in ("none", "bf16")}
    for amp, sums in totals.items():
        evaluate(TASK, model, data, sums, amp)
    exact, rounded = totals["none"].read(), totals["bf16"].read()
    assert exact["loss"] != rounded["loss"]
    assert exact["loss"] == pytest.approx(rounded["loss"], rel=0.05)
