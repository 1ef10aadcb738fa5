import pytest
import torch

from qat_runner.tasks import TASKS, Totals
from qat_runner.tasks.totals import top_five

CPU = torch.device("cpu")
TASK = TASKS["classification"]


def test_fewer_than_five_classes() -> None:
    totals = TASK.totals(CPU)
    totals.add(torch.tensor(0.5), torch.eye(3), torch.tensor([0, 1, 0]))
    assert totals.read() == {"loss": 0.5, "top1": pytest.approx(200 / 3), "top5": 100, "samples": 3}
    assert TASK.totals(CPU).read()["loss"] == 0


def test_a_sample_is_a_hit_if_all_its_targets_are() -> None:
    totals = Totals(CPU, ("exact", "exact5"), top_five)
    logits = torch.zeros(3, 9, 2)
    for sample, targets in enumerate([(4, 7), (4, 0), (1, 1)]):  # the highest logits
        logits[sample, targets, [0, 1]] = 5.0
    totals.add(torch.tensor(1.0), logits, torch.tensor([[4, 7], [4, 7], [8, 8]]))
    figures = totals.read()
    assert figures["exact"] == pytest.approx(100 / 3)
    assert figures["samples"] == 3
