"""Trackers: the real libraries offline, custom trackers, and failures, which must not affect the run."""

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat_runner.cli.run import main
from qat_runner.insertion import LayerNoise
from qat_runner.runs.record import Record
from qat_runner.runs.trackers import TRACKERS, Tracked, Tracker

EPOCH = {"epoch": 1, "train_loss": 2.5, "val_top1": 40.0, "lr": 0.1, "val_nll": float("nan")}
NOISE = [LayerNoise("conv", "weight", 4, True, "channel", 0.5, 1e-3, 20.0, 0.01, 18.0)]
CONFIG = {"bits": 4, "model": {"name": "resnet8"}, "rules": []}
SMALL = ("model=resnet8", "dataset=digits", "device=cpu", "epochs=1", "limit_train_batches=1", "limit_val_batches=1")


def two_sittings(folder: Path, tracker: str) -> tuple[dict[str, str], dict[str, str]]:
    """A run of two epochs, interrupted after the first; return the ids of the run before and after."""
    record = Record(Tracked("a_run", folder, CONFIG), trackers=[tracker])
    record.layers(0, NOISE, {"conv.weight": torch.ones(3, 1)})
    record.epoch(EPOCH)
    record.close()
    before = json.loads((folder / "trackers.json").read_text())
    record = Record(Tracked("a_run", folder, CONFIG, epoch=1), trackers=[tracker])
    record.epoch(EPOCH | {"epoch": 2, "val_top1": 50.0})
    record.close({"top1": 50.0, "clipping": "octav"})
    return before, json.loads((folder / "trackers.json").read_text())


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    before, after = two_sittings(tmp_path / "run", "mlflow")
    assert before == after and not caplog.records
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    run = client.get_run(after["mlflow"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a_run")
    assert run.data.params == {"bits": "4", "model.name": "resnet8", "rules": "[]"}
    history = client.get_metric_history(run.info.run_id, "val/top1")
    assert [(metric.step, metric.value) for metric in history] == [(1, 40.0), (2, 50.0)]
    assert run.data.metrics["layers_sqnr_db/conv.weight"] == 20.0 and run.data.metrics["result/top1"] == 50.0
    assert "val/nll" not in run.data.metrics


def test_weights_and_biases_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "a_host_of_mine")
    before, after = two_sittings(tmp_path / "run", "wandb")
    # Its log messages stay in its own files, but pytest captures such a logger as well once it is imported.
    assert not logging.getLogger("wandb").propagate
    assert before == after and not [record for record in caplog.records if record.name != "wandb"]
    sittings = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{after['wandb']}"))
    written = b"".join(file.read_bytes() for sitting in sittings for file in sitting.glob("*.wandb"))
    for content in (b"val/top1", b"layers_sqnr_db/conv.weight", b"clipping_scalars/conv.weight", b"resnet8", b"a_run"):
        assert content in written
    assert b"a_host_of_mine" not in written and wandb.run is None


class Remembering(Tracker):
    """Records what it receives."""

    received: list[Any] = []  # noqa: RUF012

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self.received.append((number, dict(figures)))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self.received.append(result)


class Broken(Tracker):
    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        raise ConnectionError("the network\nis down")


class Mistaken(Tracker):
    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self._send(figures["train_loss"])

    def _send(self, loss: float) -> None: ...

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            json.loads("no json")


class Absent(Tracker):
    package = "qat_no_such_package"
    extra = "absent"


@pytest.fixture
def ours() -> Iterator[None]:
    kinds: dict[str, type[Tracker]] = {
        "remembering": Remembering,
        "broken": Broken,
        "mistaken": Mistaken,
        "absent": Absent,
    }
    TRACKERS.update(kinds)
    Remembering.received.clear()
    yield
    for name in kinds:
        del TRACKERS[name]


def test_several_at_once_of_which_one_breaks(
    ours: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "trackers=[broken,remembering]", "run_dir=run"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"tracker broken: gave up (ConnectionError: the network is down, {__file__}:" in log
    (number, figures), result = Remembering.received
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert number == 1 and figures["val/top1"] == summary["top1"] and result["top1"] == summary["top1"]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert main([*SMALL, "trackers=[none]", "run_dir=run"]) == 0  # counts as the same run, which is finished
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trackers"] == ["broken", "remembering"]


def test_where_a_tracker_gave_up(ours: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def line_of(text: str) -> int:
        return Path(__file__).read_text().splitlines().index(text) + 1

    record = Record(Tracked("a_run", tmp_path, CONFIG), trackers=["mistaken"])
    record.epoch(EPOCH)
    line = line_of('        self._send(figures["train_loss"])')
    assert f"tracker mistaken: gave up (KeyError: 'train_loss', {__file__}:{line}); the run's" in caplog.text
    record = Record(Tracked("a_run", tmp_path, CONFIG), trackers=["mistaken"])
    record.close({"top1": 50.0})
    line = line_of('            json.loads("no json")')  # not a line inside the json module
    assert f"(JSONDecodeError: Expecting value: line 1 column 1 (char 0), {__file__}:{line})" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trackers=[tensorbord]", "trackers=tensorbord: must be some of tensorboard, wandb, mlflow, none"),
        (
            "trackers=[absent]",
            "trackers=absent: qat_no_such_package is not installed; pip install 'qat_runner[absent]'",
        ),
    ],
)
def test_what_cannot_be_had(
    ours: None,
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"remembering": 3}'])
def test_a_spoiled_note_is_no_harm(content: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(content)
    run = Tracked("run", tmp_path, {}, epoch=3)
    assert run.known_as("remembering") is None
    run.remember("remembering", "a")
    assert run.known_as("remembering") == "a" and Tracked("run", tmp_path, {}).known_as("remembering") is None
