"""Weights files of all kinds in qat-run, qat-export and qat-report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qat_runner.cli import export, report
from qat_runner.config import from_hydra, identity, load_config, run_name
from qat_runner.config.composing import compose_config
from qat_runner.data import load_dataset
from qat_runner.data.dataset import Delivery
from qat_runner.experiment.building import load_teacher
from qat_runner.models import build_model
from qat_runner.training import checkpoint
from tests.cli.commands import Run, run_in

SMALL = [
    *("backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=32", "limit_val_batches=1", "noise_batches=0"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return run_in(tmp_path, monkeypatch, SMALL)


def state(change: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
    return {
        k: change(t) if t.is_floating_point() else t for k, t in build_model("resnet20", 10, 8).state_dict().items()
    }


def cycle() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return content


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "cycle": (cycle, "contains no named tensors (only state_dict)"),
    "uint8": (lambda: state(lambda t: t.to(torch.uint8)), "tensor conv1.weight is uint8, not float32"),
    "complex": (lambda: state(lambda t: t.to(torch.complex64)), "tensor conv1.weight is complex64, not float32"),
    "NaN": (lambda: state(lambda t: t * float("nan")), "tensor conv1.weight has 432 of 432 elements that are NaN"),
    "sparse": (lambda: state(lambda t: t.to_sparse()), "tensor conv1.weight is sparse_coo (float32), not dense"),
    "meta": (lambda: state(lambda t: t.to("meta")), "tensor conv1.weight is on the meta device (float32)"),
}
USES: dict[str, tuple[str, ...]] = {
    "evaluate": ("mode=evaluate", "bits=32", "weights=w.pt"),
    "ptq": ("mode=ptq", "weights=w.pt"),
    "retrain": ("mode=retrain", "weights=w.pt"),
    "teacher": ("mode=retrain", "weights=ok.pt", "recipe.distill=full_precision", "recipe.teacher=w.pt"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_rejected_before_any_work(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, use: str
) -> None:
    make, why = HOSTILE[name]
    torch.save(make(), "w.pt")
    torch.save(state(), "ok.pt")
    before = sorted(tmp_path.rglob("*"))
    assert run(*USES[use]) == 2
    text = capsys.readouterr().err
    key = "recipe.teacher" if use == "teacher" else "weights"
    assert text.startswith(f"qat-run: {key}=w.pt: {why}") and text.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_are_checked_before_the_classes_are_counted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folders of images determine the number of classes; all layers but the head are checked before."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    torch.save(state(lambda t: t.int()), "w.pt")
    before = sorted(tmp_path.rglob("*"))
    assert run("dataset=imagefolder", "data_dir=images", "recipe=cifar10", "mode=ptq", "weights=w.pt") == 2
    assert "tensor conv1.weight is int32, not float32" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_changed_since_the_run_are_checked_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """An export reads them again after the run, and rejects changed ones in one sentence."""
    torch.save({"state_dict_ema": state(), "state_dict": state(torch.zeros_like)}, "w.pt")
    assert run("mode=ptq", "weights=w.pt", "weights_part=state_dict_ema", "run_dir=ptq") == 0
    assert run("epochs=1", "run_dir=trained") == 0
    assert export.main(["ptq", "--formats", "safetensors"]) == 0
    torch.save({"state_dict_ema": state(lambda t: t * float("inf"))}, "w.pt")
    saved = torch.load("trained/checkpoints/last.pt", weights_only=True)
    spoilt = {k: v.to(torch.complex64) for k, v in saved["model"].items()}
    checkpoint.save(Path("trained/checkpoints/last.pt"), saved | {"model": spoilt})
    capsys.readouterr()
    for folder, why in (("ptq", "elements that are NaN or infinite"), ("trained", "is complex64, not float32")):
        assert export.main([folder, "--formats", "safetensors", "--out", "out"]) == 2
        text = capsys.readouterr().err
        assert why in text and text.count("\n") == 1 and not Path("out").exists()
    assert report.main(["figure1", "--run", "trained", "--out", "out"]) == 2
    assert "tensor conv1.weight is complex64" in capsys.readouterr().err


def test_a_part_of_a_file(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The log says which part was used. Another part makes a different run; null does not change the identity."""
    torch.save({"model": state(), "model_ema": state()}, "w.pt")
    evaluate = ("mode=evaluate", "bits=32", "weights=w.pt")
    assert run(*evaluate, "run_dir=raw") == 0
    assert "weights w.pt: 97 of 97 tensors loaded from model (not model_ema)" in capsys.readouterr().out
    assert run(*evaluate, "weights_part=model_ema", "run_dir=ema") == 0
    assert "97 of 97 tensors loaded from model_ema" in capsys.readouterr().out
    raw, ema = (load_config(Path(folder)) for folder in ("raw", "ema"))
    assert raw is not None and ema is not None and run_name(raw) != run_name(ema)
    losses = [json.loads(Path(folder, "summary.json").read_text())["loss"] for folder in ("raw", "ema")]
    assert losses[0] != losses[1]
    for args, message in (
        ((*evaluate, "weights_part=emma"), "weights=w.pt: has no part emma; the parts are model, model_ema"),
        (("weights_part=ema",), "weights_part=ema: applies only to a file, not to weights=null"),
        (
            ("mode=ptq", "weights=baseline", "weights_part=ema"),
            "weights_part=ema: applies only to a file, not to weights=baseline",
        ),
        (("recipe.teacher_part=ema",), "recipe.teacher_part=ema: applies only to a file, not to recipe.teacher=null"),
    ):
        assert run(*args) == 2
        assert message in capsys.readouterr().err


def test_a_teacher_of_another_architecture(run: Run) -> None:
    torch.save(build_model("resnet32", 10, 8).state_dict(), "large.pt")
    taught = ["recipe.distill=full_precision", "recipe.teacher=large.pt", "recipe.teacher_model=resnet32"]
    config = from_hydra(
        compose_config([*taught, "model=resnet20", "dataset=fake", "dataset.image_size=8", "device=cpu"])
    )
    data = load_dataset(config.dataset, "data", Delivery(torch.device("cpu"), seed=0))
    teacher = load_teacher(config, data, None)
    assert sum(isinstance(module, torch.nn.Conv2d) for module in teacher.modules()) == 31
    assert identity(config)["distill.teacher_model"] == "resnet32"
    assert not any(module.training for module in teacher.modules())


def test_files_in_the_home_folder_and_folders_of_shards(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    torch.save({"ema": state(), "student": state()}, "home/teacher.ckpt")
    names = list(state())
    Path("home/w").mkdir()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, some in shards.items():
        save_file({name: t for name, t in state().items() if name in some}, Path("home/w", shard))
    weight_map = {name: shard for shard, some in shards.items() for name in some}
    Path("home/w/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    distill = ("recipe.distill=full_precision", "recipe.teacher='~/teacher.ckpt'", "recipe.teacher_part=ema")
    retrain = ("mode=retrain", "weights='~/w'", "epochs=1", "limit_train_batches=1")
    assert run(*retrain, *distill, "run_dir=one") == 0
    text = capsys.readouterr().out
    assert "weights ~/w: 97 of 97 tensors loaded" in text
    assert "teacher ~/teacher.ckpt: 97 of 97 tensors loaded from ema" in text
    assert run("mode=ptq", "weights='~/w/model.safetensors.index.json'", "run_dir=two") == 0
    assert export.main(["two", "--formats", "safetensors"]) == 0
