import pytest
import torch

from qat_runner.tasks import TASKS, Totals
from qat_runner.training.progress import Progress


def totals(loss: float) -> Totals:
    made = TASKS["classification"].totals(torch.device("cpu"))
    made.add(torch.tensor(loss), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    return made


def test_the_bar_shows_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(epochs=2, samples_per_epoch=8, start_epoch=0, live=True)
    progress._interval = 0.0
    progress.begin("epoch 1/2")
    assert progress.step(4, totals(1.25))
    progress._bar.refresh()
    progress.close()
    shown = capsys.readouterr().err
    for word in ("epoch 1/2", "loss 1.250", "top1 75.00 %", "img/s", "4.00/16.0"):
        assert word in shown


def test_silence_where_no_one_looks(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(epochs=2, samples_per_epoch=8, start_epoch=0)
    progress.step(4, totals(1.0))
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_no_number_is_seen() -> None:
    progress = Progress(epochs=1, samples_per_epoch=8, start_epoch=0, live=False)
    progress._interval = 0.0
    assert not progress.step(4, totals(float("nan")))
    assert not progress.step(4, totals(float("inf")))
