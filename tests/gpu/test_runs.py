"""The commands on a device: a run that is killed and resumed, its evaluation, and its export to integers."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from qat_runner.cli.export import main as qat_export
from qat_runner.cli.run import main as qat_run
from qat_runner.data import Batch
from qat_runner.runs.records import METRICS, SUMMARY
from qat_runner.training.loop import Trainer
from tests.outcome import result, same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning"),
]
UNTRAINED = (
    *("model=resnet20", "model.width=0.25", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
)
SMALL = (*UNTRAINED, "batch_size=16", "epochs=2", "checkpoint_minutes=1e-6")  # after every step


def killed(args: list[str], step: int) -> None:
    """Run qat-run, and kill its process without warning before a step."""
    sys.argv = ["qat-run"]
    original, steps = Trainer._step, 0

    def break_off(self: Trainer, batch: Batch) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    Trainer._step = break_off  # type: ignore[method-assign]
    qat_run(args)


@pytest.mark.parametrize("how", [(), ("compile=true",), ("amp=bf16",)], ids=["", "compiled", "bf16"])
def test_killed_it_goes_on_as_if_nothing_had_been(
    how: tuple[str, ...], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*SMALL, f"device={device.type}", *how]
    assert qat_run([*args, f"run_dir={tmp_path}/whole"]) == 0
    parts = [*args, f"run_dir={tmp_path}/parts"]
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(parts, 6))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "parts" / SUMMARY.name).exists()
    assert qat_run(parts) == 0
    assert "resuming after epoch 1 of 2, step 1" in (tmp_path / "parts/log.txt").read_text()
    assert same(result(tmp_path / "parts"), result(tmp_path / "whole"))


def test_it_is_measured_and_exported(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, measured = tmp_path / "trained", tmp_path / "measured"
    assert qat_run([*SMALL, f"device={device.type}", f"run_dir={trained}"]) == 0
    evaluate = ("mode=evaluate", f"weights={trained}/checkpoints/last.pt")
    assert qat_run([*UNTRAINED, f"device={device.type}", f"run_dir={measured}", *evaluate]) == 0
    found = SUMMARY.read(measured)
    last = METRICS.read(trained)[-1]
    assert found is not None and found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert found["top1"] == last["val_top1"]
    assert qat_export([str(trained), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model.safetensors").stat().st_size > 0
