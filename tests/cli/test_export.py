"""qat-export as a user sees it, run in this process."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat_runner.cli import export as command
from qat_runner.cli.run import main as qat_run
from qat_runner.exporting import run_export as exporting
from qat_runner.exporting import verify
from qat_runner.exporting.agreement import LEAST_AGREEMENT
from qat_runner.exporting.formats import read_safetensors
from qat_runner.report import run_page
from tests.tiny import tiny_bert, tiny_squad

UNTRAINED = [*("backend=eager", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64", "model=resnet8")]
FAKE = [*UNTRAINED, "batch_size=32", "epochs=1"]
Export = Callable[..., int]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs to export: dynamic, with scalars frozen in training, static, and full precision."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert qat_run([*FAKE, "run_dir=dynamic"]) == 0
        assert qat_run([*FAKE, "run_dir=frozen", "epochs=2", "recipe.freeze_scalars_at=1.5"]) == 0
        retrain = ("mode=retrain", "weights=dynamic/checkpoints/last.pt", "clipping=static_octav", "bits=8")
        assert qat_run([*FAKE, "run_dir=static", *retrain]) == 0
        assert qat_run([*FAKE, "run_dir=full", "bits=32"]) == 0
        weights = "weights=full/checkpoints/last.pt"
        assert qat_run([*UNTRAINED, "run_dir=ptq", "mode=ptq", weights, "clipping=static_percentile"]) == 0
    return folder


@pytest.fixture
def export(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    monkeypatch.chdir(runs)

    def call(run: str, *args: str) -> int:
        return command.main([run, "--out", str(tmp_path / "out"), *args])

    return call


def test_all_files_of_a_run(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export("dynamic") == 0
    out = tmp_path / "out"
    names = {"model.onnx", "model.pt2", "model.safetensors", "model.json", "export.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    result = json.loads((out / "export.json").read_text())
    summary = json.loads(Path("dynamic/summary.json").read_text())
    figures = result["figures"]
    assert figures["dynamic"]["accuracy"] == summary["top1"]  # that of the trained network
    assert figures["onnx"]["agreement"] >= LEAST_AGREEMENT
    assert figures["torch"]["largest_difference"] >= 0
    assert (result["scalars"], result["batches"], result["batchnorm_kept"]) == ("averaged", 10, [])
    assert result["bytes"]["safetensors"] < 0.25 * result["bytes"]["full_precision"]
    assert result["bytes"]["onnx"] == (out / "model.onnx").stat().st_size
    assert result["milliseconds"].keys() == {"full_precision", "onnx"}
    means = [result[key] for key in ("mean_weight_bits", "mean_activation_bits")]
    assert means == [summary[key] for key in ("mean_weight_bits", "mean_activation_bits")] and means[0] > 4
    text = capsys.readouterr().out
    assert "resnet8, 4/4 bits" in text and "same predictions %" in text and "ms per sample" in text

    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    (logits,) = session.run(None, {"images": np.zeros((5, 3, 8, 8), np.float32)})
    assert logits.shape == (5, 10)
    state = read_safetensors(out / "model.safetensors")
    assert state["layer1.0.conv1.integer_weight.codes"].abs().max() <= 8
    about = json.loads((out / "model.json").read_text())
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["image"]) == about["image"] and said["model"] == "resnet8"
    assert (about["image"]["shape"], about["image"]["mean"]) == (["N", 3, 8, 8], [0.5] * 3)


def test_only_an_export_is_replaced(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--formats", "safetensors")
    assert export("dynamic", *only, "--no-fold") == 0
    assert "bn1.weight" in read_safetensors(tmp_path / "out/model.safetensors")
    assert export("dynamic", *only) == 0
    assert "bn1.weight" not in read_safetensors(tmp_path / "out/model.safetensors")
    (tmp_path / "out/notes.txt").touch()
    assert export("dynamic", *only) == 2
    assert "out: holds more than an export (notes.txt), which would be lost" in capsys.readouterr().err
    (tmp_path / "out/notes.txt").unlink()
    (tmp_path / "out/export.json").unlink()
    assert export("dynamic", *only) == 2
    assert "out: is not an export, so it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").exists()


def test_scalars_frozen_in_training_are_kept(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("frozen", "static", "ptq"):
        assert export(run, "--formats", "safetensors") == 0
        result = json.loads((tmp_path / "out/export.json").read_text())
        assert (result["scalars"], result["batches"]) == ("static", None)
        summary = json.loads(Path(run, "summary.json").read_text())
        assert result["figures"]["static"]["accuracy"] == summary["top1"]  # nothing is lost
        assert export(run, "--scalars", "running") == 2
        assert "already have constant scalars" in capsys.readouterr().err
    assert export("frozen", "--formats", "safetensors", "--checkpoint", "previous") == 0  # from before
    assert json.loads((tmp_path / "out/export.json").read_text())["scalars"] == "averaged"
    assert export("frozen", "--formats", "safetensors") == 0
    state = torch.load("frozen/checkpoints/last.pt", weights_only=True)["model"]
    scale = read_safetensors(tmp_path / "out/model.safetensors")
    assert state["conv1.input_quantizer.s"] / 128 == scale["conv1.input_grid.scale"]


def test_rules_are_compared(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["dynamic", "--compare", "--batches", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["dynamic", "averaged", "calibrated", "running"]
    assert command.main(["frozen", "--compare"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "static"
    assert export("dynamic", "--compare") == 2
    assert "--compare: cannot be combined with --out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    exact = exporting.compare_rules(Path("dynamic"), ["running"])
    assert exact["dynamic"].accuracy == json.loads(Path("dynamic/summary.json").read_text())["top1"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: holds no run"),
        (["dynamic", "--checkpoint", "previous"], "checkpoints/previous.pt"),
        (["full"], "full: is a run in full precision, which has no integers"),
        (["dynamic", "--batches", "0"], "--batches 0: must be 1 or more"),
        (["dynamic", "--out", "static"], "static: is not an export, so it is not replaced"),
        (["dynamic", "--out", "full/summary.json"], "summary.json: is not an export, so it is not replaced"),
    ],
)
def test_invalid_commands_are_rejected(
    export: Export, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    before = sorted(Path().rglob("*"))
    assert export(*args) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("qat-export: ") and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_invalid_options_are_rejected(export: Export) -> None:
    with pytest.raises(SystemExit, match="2"):
        export("dynamic", "--scalars", "mean")


def test_a_file_that_disagrees_leaves_nothing(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "joined", lambda outputs: -outputs[0])
    assert export("dynamic", "--formats", "torch") == 1
    assert "model.pt2 disagrees with the network" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class SameKernels(verify.OnnxFile):
    """onnxruntime on a processor whose fused kernels compute what the file defines."""

    def __init__(self, path: Path, *, fused: bool) -> None:
        super().__init__(path, fused=False)


class OtherKernels(verify.OnnxFile):
    """onnxruntime on a processor whose fused kernels, or whose other kernels, compute something else."""

    wrong = True
    """true: the fused kernels compute something else; false: the other kernels do"""

    def __init__(self, path: Path, *, fused: bool) -> None:
        super().__init__(path, fused=fused)
        self.is_wrong = fused is self.wrong

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        logits = super().__call__(inputs)
        return -logits if self.is_wrong else logits


@pytest.mark.slow
def test_fused_kernels_that_compute_something_else_are_reported(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    remedy = "weight_bits=7"
    monkeypatch.setattr(verify, "OnnxFile", SameKernels)
    assert export("static", "--formats", "onnx") == 0
    assert remedy not in capsys.readouterr().out
    monkeypatch.setattr(verify, "OnnxFile", OtherKernels)
    assert export("static", "--formats", "onnx") == 0  # the file is right
    words = capsys.readouterr().out
    result = json.loads((tmp_path / "out/export.json").read_text())
    assert result["figures"]["onnx"]["agreement"] >= LEAST_AGREEMENT
    assert result["figures"]["onnx_fused"]["agreement"] < LEAST_AGREEMENT
    assert remedy in words and result["processor"] in words and "model.onnx, this processor's kernels" in words
    assert result["milliseconds"].keys() == {"full_precision", "onnx"}


def test_a_file_that_is_wrong_by_its_own_definition_is_rejected(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(verify, "OnnxFile", OtherKernels)
    monkeypatch.setattr(OtherKernels, "wrong", False)  # while the fused kernels agree
    assert export("static", "--formats", "onnx") == 1
    assert "model.onnx disagrees with the network" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_or_a_full_disk_leaves_nothing(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for trouble, code, words in (
        (KeyboardInterrupt(), 130, "interrupted; no new file was kept"),
        (OSError(28, "No space left on device"), 1, "out.tmp: No space left on device; no new file was kept"),
    ):

        def fail(*args: Any, trouble: BaseException = trouble) -> None:
            raise trouble

        monkeypatch.setattr(exporting, "_check", fail)
        assert export("dynamic", "--formats", "safetensors") == code
        assert words in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert export("dynamic", "--formats", "onnx") == 2
    assert "pip install 'qat_runner[export]'; --formats torch safetensors does not need it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    tiny_bert(tmp_path / "bert", layers=1)
    tiny_squad(tmp_path / "data" / "squad")
    monkeypatch.chdir(tmp_path)
    args: list[Any] = [
        *("backend=eager", "model=bert", "model.checkpoint=bert", "dataset=squad", "data_dir=data", "epochs=1"),
        *("dataset.max_length=40", "dataset.stride=8", "batch_size=4", "run_dir=run"),
    ]
    assert qat_run(args) == 0
    assert command.main(["run"]) == 0  # into run/export
    result = json.loads(Path("run/export/export.json").read_text())
    assert result["figures"]["onnx"]["agreement"] == 100
    layers = json.loads(Path("run/export/model.json").read_text())["layers"]
    assert "BatchNorm folded" in run_page.write(Path("run"), Path("page.html")).read_text()
    products = [layer for layer in layers.values() if layer["kind"] == "Matmul"]
    assert len(products) == 2 and products[0]["query"]["bits"] == 4
    session = verify.OnnxFile(Path("run/export/model.onnx"), fused=True)
    ids = torch.randint(5, 20, (3, 17))  # any number of texts of any length
    assert session([ids, torch.ones_like(ids), torch.zeros_like(ids)]).shape == (3, 17, 2)


def test_pact_with_weights_of_too_many_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert qat_run([*FAKE, "run_dir=pact", "clipping=pact"]) == 0
    assert command.main(["pact", "--formats", "safetensors"]) == 0
    assert (tmp_path / "pact" / "export" / "model.safetensors").is_file()
    assert qat_run([*FAKE, "run_dir=wide", "clipping=pact", "weight_bits=16"]) == 0
    capsys.readouterr()
    assert command.main(["wide"]) == 2
    assert "numbers of format midrise16, whose codes no integer type holds" in capsys.readouterr().err
    assert not (tmp_path / "wide" / "export").exists()


def test_a_weight_that_two_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert exporting._bytes(model, {}) == {"full_precision": 4 * 64}
