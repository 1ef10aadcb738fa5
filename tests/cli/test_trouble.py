"""Runs that are disturbed lose nothing: signals, damaged checkpoints, changed configs, divergence, full disks."""

import json
import os
import shutil
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from qat_runner.cli import report
from qat_runner.cli import run as cli_run
from qat_runner.cli.jobs import Outcome, Row
from qat_runner.cli.run import main
from qat_runner.errors import BusyError, StoppedError
from qat_runner.experiment import running
from qat_runner.models import MODELS
from qat_runner.runs.lock import RunLock
from qat_runner.runs.records import LAYERS, METRICS, STEPS
from qat_runner.training import checkpoint
from qat_runner.training.loop import Trainer
from tests.cli.commands import Run, run_in

SMALL = [
    *("backend=eager", "model.name=forgetful", "dataset=fake", "dataset.image_size=8"),
    *("dataset.fake_pictures=64", "batch_size=16", "epochs=2"),
]


def forgetful(num_classes: int, small: bool, width: float) -> nn.Module:
    """Return a network of few layers, with running averages (BatchNorm) and randomness (dropout)."""
    layers = {
        "first": nn.Conv2d(3, 8, 3, padding=1),
        "averages": nn.BatchNorm2d(8),
        "second": nn.Conv2d(8, 8, 3, stride=2),
        "relu": nn.ReLU(),
        "flat": nn.Flatten(),
        "dropout": nn.Dropout(0.2),
        "last": nn.Linear(72, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


@pytest.fixture(autouse=True, scope="module")
def _known() -> Iterator[None]:
    with patch.dict(MODELS, forgetful=forgetful):
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return run_in(tmp_path, monkeypatch, SMALL)


def at_step(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int, act: Callable[[Trainer], object]) -> None:
    """Call `act` before a step of an epoch (both counted from 1)."""
    before = Trainer._add_gradients

    def add_gradients(trainer: Trainer, batch: Any) -> Any:
        if (trainer.state.epoch + 1, trainer.state.step + len(trainer.interval.rates) + 1) == (epoch, step):
            act(trainer)
        return before(trainer, batch)

    monkeypatch.setattr(Trainer, "_add_gradients", add_gradients)


def outcome(folder: Path | str) -> dict[str, Any]:
    last = checkpoint.load(Path(folder, "checkpoints", checkpoint.LAST))
    rows = [(row["epoch"], row["step"], row["loss"]) for row in STEPS.read(Path(folder))]
    return {"rows": rows, "weight": last["model"]["last.weight"].tolist()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the outcome of a run that is not interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([*SMALL, f"run_dir={folder}"]) == 0
    return outcome(folder)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.reliability) for n in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_saves_and_stops_within_an_epoch(
    number: signal.Signals,
    whole: dict[str, Any],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, 3, lambda trainer: os.kill(os.getpid(), number))
        capsys.readouterr()
        assert run("run_dir=stopped") == 128 + number
    assert f"stopped by {number.name} after step 3 of epoch 2; the same command resumes it" in capsys.readouterr().err
    assert not Path("stopped/error.txt").exists() and not Path("stopped/lock").exists()
    assert run("run_dir=stopped") == 0
    assert "resuming after epoch 1 of 2, step 3 of the next" in capsys.readouterr().out
    assert outcome("stopped") == whole
    assert len(whole["rows"]) == 8


@pytest.mark.reliability
def test_a_signal_during_validation(whole: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Trainer._evaluate

    def stopped(trainer: Trainer, progress: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", stopped)
        assert run("run_dir=stopped", "dataset.val_batch_size=4") == 143
    assert not Path("stopped/metrics.csv").exists()
    assert run("run_dir=stopped", "dataset.val_batch_size=4") == 0
    assert outcome("stopped") == whole


def test_a_requeued_job_resumes_the_run_that_overwrite_has_begun(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    anew = ("run_dir=one", "epochs=2", "limit_train_batches=1", "overwrite=true")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with monkeypatch.context() as patch:
        at_step(patch, 2, 1, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))
        assert run(*anew) == 128 + signal.SIGUSR1
    assert "the same command without overwrite=true resumes it" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(*anew) == 0
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out
    assert run(*anew) == 0
    assert "one is finished already" in capsys.readouterr().out


def test_an_interruption_prints_the_command_that_resumes_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_run, "_run_all", interrupted)
    for overwrite, command in (("false", "the same command"), ("true", "the same command without overwrite=true")):
        assert run(f"overwrite={overwrite}") == 130
        assert f"interrupted; {command} resumes from the last checkpoint" in capsys.readouterr().err


def test_a_stop_ends_the_whole_sweep(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 1, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert run("-m", "seed=0,1,2", "epochs=1") == 143
    assert "had not started" not in capsys.readouterr().err
    assert len([*Path("runs").glob("*/config.yaml")]) == 1
    assert run("-m", "seed=1,2", "epochs=1") == 0
    capsys.readouterr()
    at_step(monkeypatch, 1, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert run("-m", "seed=0,1,2", "epochs=1", "overwrite=true") == 143
    text = capsys.readouterr()
    assert "and 1 more: had not started; the earlier run still exists, and overwrite=true replaces it" in text.err
    assert "top1" not in text.out  # of the earlier runs


def test_a_stop_after_the_last_step_ends_the_sweep_after_that_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = Trainer.measure_noise

    def stopped(trainer: Trainer) -> None:
        if trainer.state.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        noise(trainer)

    monkeypatch.setattr(Trainer, "measure_noise", stopped)
    assert run("-m", "seed=0,1", "epochs=1") == 143
    assert "stopped by SIGTERM after the run had finished" in capsys.readouterr().err
    assert len([*Path("runs").glob("*/summary.json")]) == len([*Path("runs").glob("*/config.yaml")]) == 1


def test_fewer_epochs_than_a_run_has_begun_are_rejected(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, 1, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert run("run_dir=one", "epochs=3") == 143
    assert run("run_dir=one", "epochs=1", "resume=force") == 2
    assert "one: is already in epoch 2 of 3, so it cannot be continued with epochs=1" in capsys.readouterr().err
    assert run("run_dir=one", "epochs=2", "resume=force") == 0
    assert len(outcome("one")["rows"]) == 8


def test_a_rejected_command_shows_no_earlier_result(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run_dir=one", "epochs=1") == 0
    assert "top1" in capsys.readouterr().out
    assert run("run_dir=one", "epochs=1", "bits=3", "resume=force") == 2
    text = capsys.readouterr()
    assert "has been trained to its end" in text.err and "top1" not in text.out


@pytest.mark.reliability
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    whole: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert run("run_dir=cut") == 143
    last = Path("cut/checkpoints/last.pt")
    last.write_bytes(last.read_bytes()[:5000])
    assert run("run_dir=cut") == 0
    assert "last.pt cannot be read (it is damaged" in Path("cut/log.txt").read_text()
    assert "resuming after epoch 1 of 2" in Path("cut/log.txt").read_text()
    assert outcome("cut") == whole


def test_a_changed_config_is_rejected_unless_forced(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run_dir=one", "epochs=1") == 0
    capsys.readouterr()
    assert run("run_dir=one", "epochs=2", "gradient=ste") == 2
    err = capsys.readouterr().err
    assert "holds a run with a different epochs, gradient.name; overwrite=true replaces it, resume=force c" in err
    for words, ways in (
        (["epochs=1", "gradient=ste"], "overwrite=true replaces it, resume=force with epochs=2 continues it"),
        (
            ["epochs=2", "model.name=resnet20"],
            "model.name; overwrite=true replaces it, another run_dir keeps both",
        ),
    ):
        assert run("run_dir=one", *words) == 2
        assert ways in capsys.readouterr().err
    assert run("run_dir=one", "epochs=2", "gradient=ste", "resume=force") == 0
    assert "resuming after epoch 1 of 2" in Path("one/log.txt").read_text()
    assert len(METRICS.read(Path("one"))) == 2
    capsys.readouterr()
    assert run("run_dir=one", "epochs=2", "gradient=ste", "recipe.batchnorm_batches=2", "resume=force") == 2
    text = "has been trained to its end, so a different batchnorm_batches would change nothing; epochs=3 continues"
    assert text in capsys.readouterr().err and Path("one/summary.json").exists()
    assert run("run_dir=one", "epochs=3", "model.name=resnet20", "resume=force") == 2
    assert "does not fit this run (Error(s) in loading state_dict" in capsys.readouterr().err
    assert Path("one/summary.json").exists()


def test_a_folder_has_one_path(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A path through a folder that does not exist is the same run, and does not create that folder."""
    assert run("run_dir=one", "epochs=1") == 0
    assert run("run_dir=one/sub/..", "epochs=1") == 0
    assert "one is finished already" in capsys.readouterr().out
    assert run("run_dir=one/sub/../", "epochs=1", "gradient=ste") == 2
    assert "run_dir=one: holds a run with a different gradient.name" in capsys.readouterr().err
    assert not Path("one/sub").exists()
    Path("elsewhere/deep").mkdir(parents=True)
    Path("link").symlink_to("elsewhere/deep")
    assert run("run_dir=link/../two", "epochs=1", "noise_batches=0") == 0  # as the file system has it
    assert Path("elsewhere/two/summary.json").exists()


@pytest.mark.parametrize("eval_mode", ["running", "last"])
def test_scalars_that_training_stores_for_evaluation(eval_mode: str, run: Run) -> None:
    assert run("run_dir=one", f"clipping.eval_mode={eval_mode}", "epochs=1") == 0
    assert {row["epoch"] for row in LAYERS.read(Path("one"))} == {1}  # there are none before the first step


@pytest.mark.reliability
def test_files_that_a_killed_process_may_leave(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one").mkdir()
    Path("one/error.txt").write_text("broke off before it began")
    Path("one/lock").write_text("{}")
    assert run("run_dir=one", "epochs=1") == 0
    Path("one/summary.json.tmp").write_text("{")
    assert run("run_dir=one", "epochs=1", "overwrite=true") == 0
    assert not Path("one/error.txt").exists()
    Path("one/notes.tmp").write_text("mine")
    assert run("run_dir=one", "epochs=1", "overwrite=true") == 2
    assert "holds more than a run (notes.tmp), so it is left alone" in capsys.readouterr().err


def test_a_run_of_two_processes_is_resumed_with_one(
    run: Run, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 1, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert run("run_dir=one") == 143
    path = Path("one/checkpoints/last.pt")
    content = checkpoint.load(path)
    (own,) = content["processes"]
    shares = [own | {"totals": own["totals"] * share} for share in (0.25, 0.75)]
    checkpoint.save(path, content | {"processes": shares})
    assert run("run_dir=one") == 0
    assert "1 process(es) resume a run of 2: the data order stays the same" in capsys.readouterr().out
    assert outcome("one") == whole


def test_resume_never(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 1, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert run("run_dir=one") == 143
    assert run("run_dir=one", "resume=never") == 2
    assert "holds an unfinished run, and resume=never forbids resuming it" in capsys.readouterr().err
    assert run("run_dir=one") == 0
    assert run("run_dir=one", "resume=never") == 0  # finished: shown


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (["model.name=resnet20"], "last.pt does not fit this run"),
        (["no checkpoint"], "one/checkpoints holds no checkpoint"),
        (["half"], "last.pt cannot be read (it is damaged"),
    ],
)
def test_a_finished_run_that_cannot_be_resumed_is_not_lost(
    others: list[str], why: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run_dir=one", "epochs=1") == 0
    last = Path("one/checkpoints/last.pt")
    if others == ["no checkpoint"]:
        shutil.rmtree(last.parent)
    if others == ["half"]:
        last.write_bytes(last.read_bytes()[:5000])
    before = {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("run_dir=one", "epochs=2", "resume=force", *(word for word in others if "=" in word)) == 2
    err = capsys.readouterr().err
    assert "run_dir=one: is finished and cannot be continued: " in err and why in err
    assert {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()} == before


def test_a_network_that_diverges(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))

    at_step(monkeypatch, 2, 2, spoil)
    assert run("run_dir=one", "checkpoint_minutes=1e-6") == 1
    err = capsys.readouterr().err
    assert "the loss became nan at step 2 of epoch 2; a smaller lr" in err
    assert "the noisiest tensor was " in err and " dB (one/layers.csv" in err
    saved = checkpoint.newest(Path("one/checkpoints"))
    assert (saved["state"]["epoch"], saved["state"]["step"]) == (1, 1)
    assert all(torch.isfinite(t).all() for t in saved["model"].values() if t.is_floating_point())
    assert "the loss became nan" in Path("one/error.txt").read_text()


def test_an_internal_error_is_one_sentence_and_does_not_affect_other_rows(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(trainer: Trainer) -> None:
        if trainer.config.seed == 1:
            raise ZeroDivisionError("oops")

    with monkeypatch.context() as patch:
        at_step(patch, 1, 1, fail)
        assert run("-m", "seed=0,1,2", "epochs=1") == 1
    err = capsys.readouterr().err
    assert "internal error (ZeroDivisionError: oops), see runs/" in err
    assert "Traceback" not in err
    failed = next(Path("runs").glob("*seed1*"))
    assert "Traceback" in (failed / "error.txt").read_text()

    assert report.main(["status", "runs"]) == 0
    out = capsys.readouterr().out
    assert "2 finished, 1 failed" in out and "internal error (ZeroDivisionError: oops)" in " ".join(out.split())
    assert run("-m", "seed=0,1,2", "epochs=1") == 0
    assert not (failed / "error.txt").exists()


def test_status(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, 1, lambda trainer: os.kill(os.getpid(), signal.SIGTERM) if trainer.config.seed else None)
        assert run("-m", "seed=0,1,2") == 143
    capsys.readouterr()
    assert report.main(["status", "runs"]) == 0
    out = capsys.readouterr().out
    assert "1 finished, 1 stale, 1 missing" in out
    assert "no process is carrying it out; the same command resumes it" in out and "not started" in out
    stale = next(Path("runs").glob("*seed1*"))
    assert report.main(["status", str(stale)]) == 0 and capsys.readouterr().out.rstrip().endswith("\n1 stale")
    for verb in ("table1", "results", "ledger", "figure4"):
        assert report.main([verb, str(stale)]) == 2
        assert f"{stale}: is a run, not a folder of runs; pass {stale.resolve().parent}" in capsys.readouterr().err
    with RunLock(stale):
        assert report.main(["status", "runs"]) == 0
        assert "1 finished, 1 running, 1 missing" in capsys.readouterr().out
        assert run("seed=1") == 1
        assert f"process {os.getpid()} on " in capsys.readouterr().err
    (stale / "summary.json").write_text("{")
    assert report.main(["status", "runs"]) == 0
    out = capsys.readouterr().out
    assert "summary.json:cannotberead" in "".join(out.split()) and "1 finished, 1 missing, 1 unreadable" in out


def test_a_run_continues_when_nobody_reads_its_output(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        assert run("run_dir=one", "epochs=1") == 0
        print("what is said later", flush=True)
    assert not Path("one/error.txt").exists() and Path("one/summary.json").exists()
    assert "run folder one" in Path("one/log.txt").read_text()


@pytest.mark.reliability
def test_a_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        at_step(patch, 2, 1, lambda trainer: patch.setattr(torch, "save", full))
        assert run("run_dir=one") == 1
    err = capsys.readouterr().err
    assert "one: failed (one/checkpoints: No space left on device); what was recorded before is intact" in err
    assert run("run_dir=one") == 0
    assert json.loads(Path("one/summary.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    "override", ["hydra.launcher._target_=os.system", "+x._target_=os.system", "+model._target_=a.b"]
)
def test_a_config_cannot_name_code(override: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", override) == 2
    assert "_target_: a config cannot name code to run" in capsys.readouterr().err
    assert not [*Path().iterdir()]


@pytest.mark.reliability
def test_a_stop_also_ends_a_sweep_that_waits_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_runner import experiment

    order: list[tuple[str, str]] = []

    def busy(config: Any) -> None:
        order.append(("run", config))
        raise BusyError("process 1 on elsewhere is using it")

    def stopped(config: Any) -> None:
        order.append(("after others", config))
        raise StoppedError("stopped by SIGTERM", signal.SIGTERM)

    monkeypatch.setattr(experiment, "run", busy)
    monkeypatch.setattr(experiment, "run_after_others", stopped)
    rows, came = {Path(name): Row(name, []) for name in "ab"}, Outcome()  # type: ignore[arg-type]
    cli_run._run_here(rows, True, came)
    assert order == [("run", "a"), ("run", "b"), ("after others", "a")]
    assert [type(failure) for failure in came.failures] == [StoppedError]
    assert came.left == [Path("b")] and not came.done


def test_a_sweep_waits_for_rows_that_other_processes_work_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep runs all other rows first; a single run fails at once."""
    from qat_runner import experiment

    real, order = experiment.run, []
    left = {"0": 2}  # how often the first row is busy

    def busy_at_first(config: Any) -> Any:
        order.append(config.seed)
        if config.seed == 0 and left["0"]:
            left["0"] -= 1
            raise BusyError("run_dir=one: process 1 on elsewhere is using it")
        return real(config)

    monkeypatch.setattr(experiment, "run", busy_at_first)
    monkeypatch.setattr(running, "run", busy_at_first)
    monkeypatch.setattr(running, "PATIENCE", 0.01)
    assert run("-m", "seed=0,1", "epochs=1") == 0
    assert order == [0, 1, 0, 0]
    assert capsys.readouterr().out.count("is using it: waiting for it") == 1
    left["0"] = 1
    assert run("seed=0", "epochs=1") == 1
