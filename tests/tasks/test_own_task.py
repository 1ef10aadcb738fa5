"""A custom task with a custom data set supports everything: training, evaluation, retraining, export and reports."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from qat_runner.cli import export, report
from qat_runner.cli.run import main
from qat_runner.config.tasks import FACTS
from qat_runner.data import DATASETS
from qat_runner.tasks import TASKS, register
from tests.plugins.my_package.regression import NUMBERS, Regression

UNTRAINED = [
    *("dataset.name=numbers", "dataset.task=regression", "model=resnet8", "backend=eager"),
    *("dataset.val_batch_size=90", "limit_train_batches=4", "noise_batches=0", "limit_val_batches=1"),
]
SMALL = [*UNTRAINED, "lr=0.01", "batch_size=64"]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with patch.dict(TASKS), patch.dict(FACTS), patch.dict(DATASETS):
        register(Regression())
        DATASETS["numbers"] = NUMBERS
        yield


def test_from_training_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "epochs=2", "run_dir=run"]) == 0
    assert "rounded %" in capsys.readouterr().out
    with open("run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]][:5] == ["epoch", "train_loss", "train_rounded", "val_loss", "val_rounded"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    trained = json.loads(Path("run/summary.json").read_text())
    assert (trained["metric"], trained["mode"]) == ("rounded", "scratch")
    assert 0 <= trained["rounded"] <= trained["best_rounded"] <= 100

    assert main([*UNTRAINED, "mode=evaluate", "weights=run/checkpoints/last.pt", "run_dir=evaluated"]) == 0
    evaluated = json.loads(Path("evaluated/summary.json").read_text())
    assert [evaluated[key] for key in ("rounded", "loss")] == [trained[key] for key in ("rounded", "loss")]

    retrained = ["epochs=1", "mode=retrain", "weights=run/checkpoints/last.pt", "recipe=cifar10"]
    assert main([*SMALL, *retrained, "recipe.distill=full_precision", "run_dir=distilled"]) == 0

    assert report.main(["run"]) == 0
    assert "rounded" in Path("run/report.html").read_text()
    assert report.main(["compare", "run", "distilled", "evaluated"]) == 0
    assert "rounded" in Path("report/compare.html").read_text()


@pytest.mark.slow
def test_its_files_do_what_the_network_does() -> None:
    pytest.importorskip("onnxruntime")
    assert main([*SMALL, "epochs=1", "bits=8", "run_dir=run"]) == 0
    assert export.main(["run"]) == 0
    exported = json.loads(Path("run/export/export.json").read_text())
    assert exported["metric"] == "rounded"
    assert exported["figures"]["onnx"]["agreement"] > 95
    assert "standard_error" in exported["figures"]["onnx"]
    described = json.loads(Path("run/export/model.json").read_text())
    assert (described["inputs"], described["outputs"]) == (["images"], ["number"])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["dataset.task=classification"], "dataset.task=classification: must be regression, the task of numbers"),
        (["dataset.task=poetry"], "dataset.task=poetry: must be one of classification, question_answering, language_"),
        (["model=bert"], "model=bert: does not support dataset=numbers; must be one of resnet18"),
        (["dataset.image_size=0"], "dataset.image_size=0: must be 1 to"),
    ],
)
def test_what_does_not_fit_it(wrong: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *wrong]) == 2
    assert text in capsys.readouterr().err
    assert not Path("runs").exists()
