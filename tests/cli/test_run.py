"""qat-run as a user sees it, run in this process with small networks and small images."""

import csv
import json
import logging
import math
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qat_runner import experiment
from qat_runner.cli.report import main as report
from qat_runner.data import Batch
from qat_runner.experiment import running
from qat_runner.models import build_model
from qat_runner.training.loop import Trainer
from tests.cli.commands import Run, run_in

SMALL = [
    "backend=eager",
    "model=resnet8",
    "dataset=fake",
    "dataset.image_size=8",
    "dataset.fake_pictures=64",
    "batch_size=32",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return run_in(tmp_path, monkeypatch, SMALL)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def only_run(root: Path = Path("runs")) -> Path:
    (folder,) = [path for path in root.iterdir() if path.is_dir()]
    return folder


@pytest.mark.plots
def test_the_record_of_a_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("epochs=2", "seed=7") == 0
    folder = only_run()
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "curves.png",
        "environment.json",
        "histograms.json",
        "layers.csv",
        "log.txt",
        "metrics.csv",
        "noise.png",
        "quantizers.txt",
        "steps.csv",
        "summary.json",
        "tensorboard",
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}

    metrics = rows(folder / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in metrics for value in row.values())
    assert [(row["epoch"], row["step"]) for row in rows(folder / "steps.csv")] == [
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
        ("2", "2"),
    ]
    layers = rows(folder / "layers.csv")
    assert list(layers[0]) == [
        *("epoch", "layer", "tensor", "bits", "signed", "granularity"),
        *("s", "mse", "sqnr_db", "clipped_fraction", "max_sqnr_db"),
    ]
    assert len(layers) == 3 * 2 * 8  # epochs 0, 1, 2; weight and input of 8 layers
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "model": "resnet8",
        "dataset": "fake",
        "bits": 4,
        "clipping": "octav",
        "gradient": "mph",
        "mode": "scratch",
        "seed": 7,
        "epochs": 2,
        "steps": 4,
    }.items() <= summary.items()
    assert {
        "top1",
        "top5",
        "best_top1",
        "loss",
        "samples_per_second",
        "seconds",
        "sqnr_db",
        "quantization_mse",
    } <= summary.keys()
    last = [row for row in layers if row["epoch"] == "2"]
    assert summary["sqnr_db"] == pytest.approx(sum(float(row["sqnr_db"]) for row in last) / len(last))
    assert summary["quantization_mse"] == pytest.approx(sum(float(row["mse"]) for row in last) / len(last))
    each = [float(row["val_top1"]) for row in metrics]
    assert summary["top1"] == pytest.approx(each[-1]) and summary["best_top1"] == pytest.approx(max(each))
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    assert best["state"]["epoch"] == 1 + each.index(max(each))

    assert yaml.safe_load((folder / "config.yaml").read_text())["weight_bits"] == 4
    environment = json.loads((folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["command"][0] == "qat-run"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert environment["git"] is None if head.returncode else environment["git"]["commit"] == head.stdout.strip()
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert {"val/top1", "train/loss", "layers_sqnr_db/conv1.weight"} <= set(board.Tags()["scalars"])
    assert "clipping_scalars/conv1.weight" in board.Tags()["histograms"]
    assert [e.step for e in board.Scalars("val/top1")] == [1, 2]
    for plot in ("curves.png", "noise.png"):
        assert (folder / plot).stat().st_size > 10_000

    out = capsys.readouterr().out
    assert "layer1.0.conv1  weight" in out
    assert "top1 %" in out
    assert "epoch 2/2: train loss" in (folder / "log.txt").read_text()


def test_a_finished_run_is_looked_up_and_overwrite_starts_from_scratch(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("epochs=1") == 0
    folder = only_run()
    first, weights = rows(folder / "steps.csv"), (folder / "checkpoints/last.pt").stat().st_mtime_ns
    assert run("epochs=1") == 0
    assert "is finished already" in capsys.readouterr().out
    assert (folder / "checkpoints/last.pt").stat().st_mtime_ns == weights
    assert run("epochs=1", "overwrite=true") == 0
    assert (folder / "checkpoints/last.pt").stat().st_mtime_ns > weights
    assert rows(folder / "steps.csv") == first  # same config and seed: same numbers


def test_an_interrupted_run_ends_like_an_uninterrupted_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("epochs=3", "run_dir=whole") == 0
    original = Trainer._train_epoch

    def break_off(self: Trainer, epoch: int, progress: Any) -> dict[str, float]:
        if epoch == 2:
            self.record.steps([{"epoch": 3, "step": 1, "loss": 0.0, "lr": 0.0}])  # rows that a killed epoch may leave
            raise KeyboardInterrupt
        return original(self, epoch, progress)

    monkeypatch.setattr(Trainer, "_train_epoch", break_off)
    assert run("epochs=3", "run_dir=parts") == 130
    assert not Path("parts/summary.json").exists()
    monkeypatch.setattr(Trainer, "_train_epoch", original)
    assert run("epochs=3", "run_dir=parts") == 0
    for name in ("steps.csv", "layers.csv"):
        assert rows(Path("parts") / name) == rows(Path("whole") / name)
    kept = ("epoch", "train_loss", "val_loss", "val_top1", "lr", "sqnr_db")
    whole, parts = ([[row[k] for k in kept] for row in rows(Path(d) / "metrics.csv")] for d in ("whole", "parts"))
    assert whole == parts
    a, b = (torch.load(Path(d) / "checkpoints/last.pt")["model"] for d in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_scalars_are_frozen_at_the_last_step_at_the_latest(run: Run) -> None:
    assert run("epochs=1", "limit_train_batches=2", "recipe.freeze_scalars_at=0.75") == 0
    (folder,) = Path("runs").iterdir()
    assert "static from here on (epoch 0.5)" in (folder / "log.txt").read_text()
    assert json.loads((folder / "summary.json").read_text())["clipping"] == "octav-to-static"
    assert run("epochs=1", "limit_train_batches=1", "recipe.freeze_scalars_at=0.75", "run_dir=short") == 0
    assert "static from here on" not in Path("short/log.txt").read_text()  # there are no scalars before the only step
    assert json.loads(Path("short/summary.json").read_text())["clipping"] == "octav"


def test_scalars_frozen_in_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    freezing = ("epochs=2", "recipe.freeze_scalars_at=0.5")
    assert run(*freezing, "run_dir=whole") == 0
    first, second = (
        {
            row["layer"]: row["s"]
            for row in rows(Path("whole/layers.csv"))
            if row["epoch"] == e and row["tensor"] == "input"
        }
        for e in ("1", "2")
    )
    assert first == second and len(first) == 8  # from then on, in evaluation as in training
    assert "static from here on (epoch 0.5)" in Path("whole/log.txt").read_text()
    assert json.loads(Path("whole/summary.json").read_text())["clipping"] == "octav-to-static"
    original = Trainer._train_epoch

    def break_off(self: Trainer, epoch: int, progress: Any) -> dict[str, float]:
        if epoch == 1:
            raise KeyboardInterrupt
        return original(self, epoch, progress)

    monkeypatch.setattr(Trainer, "_train_epoch", break_off)
    assert run(*freezing, "run_dir=parts") == 130
    monkeypatch.setattr(Trainer, "_train_epoch", original)
    assert run(*freezing, "run_dir=parts") == 0
    for name in ("steps.csv", "layers.csv"):
        assert rows(Path("parts") / name) == rows(Path("whole") / name)
    assert run("epochs=2", "run_dir=free") == 0
    assert rows(Path("free/steps.csv"))[0] == rows(Path("whole/steps.csv"))[0]
    assert rows(Path("free/steps.csv"))[-1] != rows(Path("whole/steps.csv"))[-1]


def test_a_sweep(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", "bits=4,8,32", "clipping=octav,max", "epochs=1") == 0
    folders = [path for path in Path("runs").iterdir() if path.is_dir()]
    assert len(folders) == 5  # the full-precision baseline has no clipping, and is run once
    summaries = [json.loads((f / "summary.json").read_text()) for f in folders]
    assert {(s["bits"], s["clipping"]) for s in summaries} == {
        *((bits, clipping) for bits in (4, 8) for clipping in ("octav", "max")),
        (32, "none"),
    }
    table = capsys.readouterr().out
    assert "vs fp32" in table
    assert table.count("resnet8  fake") == 5
    assert "6 rows are 5 runs: keys without effect" in table and "\nrun 5 of 5\n" in table
    assert run("bits=4", "epochs=1") == 0  # a single run, which is compared as well
    row = capsys.readouterr().out.splitlines()[-3]
    gap = {(s["bits"], s["clipping"]): s["top1"] for s in summaries}
    assert f" {gap[4, 'octav'] - gap[32, 'none']:+.2f} " in row
    assert "is finished already" not in table
    assert "Over seeds" not in table


def test_a_row_that_occurs_twice_is_run_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("-m", "bits=32", "clipping=octav,max", "epochs=1", "overwrite=true") == 0
        assert capsys.readouterr().out.count("epoch 1/1") == 1


def test_a_row_in_two_folders_of_runs_is_run_in_both(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    result = {"metric": "top1", "top1": 0.0}
    monkeypatch.setattr(experiment, "run", lambda config: asked.append(config.runs_dir) or result)
    assert run("-m", "runs_dir=a,b") == 0
    assert asked == ["a", "b"]


def test_a_sweep_over_seeds_ends_with_means_and_the_command_of_its_html_report(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-m", "bits=32,4", "clipping=octav,max", "epochs=1", "seed=0,1", "runs_dir=two words") == 0
    table, sentence, closing = (
        capsys.readouterr().out.split("Over seeds, mean ± standard deviation:")[1].strip().split("\n\n")
    )
    assert [line.split()[6] for line in table.splitlines()[2:]] == ["2"] * 3
    assert all(" ± " in line for line in table.splitlines()[2:])
    top1 = {
        (s["bits"], s["clipping"], s["seed"]): s["top1"]
        for s in (json.loads(path.read_text()) for path in Path("two words").glob("*/summary.json"))
    }
    drops = [top1[4, "max", seed] - top1[32, "none", seed] for seed in (0, 1)]
    assert f"{sum(drops) / 2:+.2f} ± " in table.splitlines()[-1]
    assert sentence.startswith("resnet8, fake, scratch, 4 bits, in points against full precision: octav ")
    command, expected = closing.split(" writes an HTML report of them")
    assert (command, expected) == ("qat-report compare 'two words'", "")
    assert report(shlex.split(command)[1:]) == 0
    assert Path("report/compare.html").is_file()


def test_a_run_ends_with_the_command_of_its_html_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("epochs=1", "run_dir=mine") == 0
    assert capsys.readouterr().out.endswith("\n\nqat-report mine writes an HTML report of it\n")


def test_a_failed_row_is_reported_and_the_others_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", "lr=0.01,1e30", "epochs=2") == 1
    captured = capsys.readouterr()
    assert "the loss became" in captured.err or "the network has diverged" in captured.err
    assert captured.err.count("\n") == 1
    finished = [path for path in Path("runs").iterdir() if (path / "summary.json").is_file()]
    assert len(finished) == 1
    assert captured.out.count("resnet8  fake") == 1


def test_evaluation_uses_the_scalars_that_training_froze(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The scalars are those of the file, dynamic or static. Another config is rejected; files of old versions load."""
    freezing = ("epochs=2", "recipe.freeze_scalars_at=0.5", "run_dir=whole")
    assert run(*freezing) == 0
    saved = torch.load("whole/checkpoints/last.pt", weights_only=True)
    saved["model"] = {k: v for k, v in saved["model"].items() if not k.endswith(("quantizer.seen", "quantizer.static"))}
    torch.save(saved | {"state": saved["state"] | {"held": True}}, "old.pt")
    assert run("epochs=1", "run_dir=dynamic") == 0
    for name, weights in (("new", "whole/checkpoints/last.pt"), ("old", "old.pt")):
        assert run("mode=evaluate", f"weights={weights}", f"run_dir={name}") == 0
        found, trained = (json.loads(Path(d, "summary.json").read_text()) for d in (name, "whole"))
        assert (found["loss"], found["top1"]) == (trained["loss"], trained["top1"])
        assert found["clipping"] == trained["clipping"] == "octav-to-static"
        assert "8 of 16 quantized tensors have static clipping scalars" in capsys.readouterr().out
    evaluate = ("mode=evaluate", "clipping=static_octav", "weights=dynamic/checkpoints/last.pt", "run_dir=refused")
    assert run(*evaluate) == 2 and not Path("refused").exists()
    retrain = ("mode=retrain", "weights=whole/checkpoints/last.pt", "epochs=1", "run_dir=retrained")
    assert run(*retrain) == 0  # with its own quantizers
    state = torch.load("retrained/checkpoints/last.pt", weights_only=True)["model"]
    assert not any(value for key, value in state.items() if key.endswith("_quantizer.static"))


def test_calibration_has_its_own_batch_size(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    ptq = ["mode=ptq", "weights=w.pt", "clipping=static_octav", "dataset.fake_pictures=400"]
    assert run(*ptq, "run_dir=one") == 0
    assert "scalars calibrated on 5 training batches of 64" in capsys.readouterr().out
    assert run(*ptq, "clipping.calibration_batch_size=16", "clipping.calibration_batches=2", "run_dir=two") == 0
    assert "scalars calibrated on 2 training batches of 16" in capsys.readouterr().out
    assert run(*ptq, "clipping.calibration_batch_size=0") == 2


def test_an_input_that_no_batch_reached_is_reported_in_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    monkeypatch.setattr("qat_runner.experiment.building.calibrate", lambda model, batches: 5)
    assert run("mode=retrain", "weights=w.pt", "clipping=static_octav", "run_dir=one") == 1
    expected = capsys.readouterr().err
    assert "conv1.input (static) has no clipping scalars yet" in expected and "internal error" not in expected


@pytest.mark.parametrize("clipping", ["static_octav", "static_percentile", "percentile", "mse_sweep"])
def test_every_clipping_method_trains(run: Run, clipping: str) -> None:
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    extra = ["clipping.points=10"] if clipping == "mse_sweep" else []
    retrain = ["mode=retrain", "weights=w.pt", "epochs=1", "limit_train_batches=1"]
    assert run(f"clipping={clipping}", "gradient=pwl", *retrain, *extra) == 0
    layers = rows(only_run() / "layers.csv")
    if clipping.startswith("static"):
        s = {row["epoch"]: row["s"] for row in layers if (row["layer"], row["tensor"]) == ("layer1.0.conv1", "input")}
        assert s["0"] == s["1"]


def test_modes_that_need_weights(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": build_model("resnet8", 10, 8).state_dict()}, tmp_path / "w.pt")
    assert run("mode=evaluate", "bits=32", "weights=w.pt", "run_dir=full") == 0
    assert run("mode=ptq", "bits=8", "weights=w.pt", "run_dir=ptq") == 0
    assert run("mode=ptq", "bits=8", "weights=w.pt", "clipping.eval_mode=running", "run_dir=running") == 0
    assert run("mode=retrain", "bits=8", "weights=w.pt", "epochs=1", "run_dir=retrain") == 0
    assert run("mode=evaluate", "bits=8", "weights=retrain/checkpoints/last.pt", "run_dir=again") == 0
    read = {d: json.loads(Path(d, "summary.json").read_text()) for d in ("full", "ptq", "running", "retrain", "again")}
    assert read["full"]["loss"] == pytest.approx(read["ptq"]["loss"], rel=0.05)
    assert read["ptq"]["epochs"] == read["ptq"]["steps"] == 0
    assert read["full"]["sqnr_db"] is None
    assert read["again"]["loss"] == read["retrain"]["loss"]
    assert not Path("ptq/metrics.csv").exists()
    assert Path("ptq/noise.png").exists()


def test_precision_and_layout_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], Trainer._loss

    def noted(trainer: Trainer, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        images, weight = batch.inputs[0], trainer.model.conv1.weight
        last = [t.is_contiguous(memory_format=torch.channels_last) for t in (images, weight)]
        seen.append((logits.dtype, batch.size, last))
        return before(trainer, logits, batch)

    monkeypatch.setattr(Trainer, "_loss", noted)
    short = ("epochs=1", "limit_train_batches=1", "noise_batches=0", "limit_val_batches=1")
    assert run("amp=bf16", "channels_last=false", "accumulate=3", *short, "run_dir=one") == 0
    assert seen == [(torch.bfloat16, size, [False, False]) for size in (11, 11, 10)]
    assert not Path("one/layers.csv").exists()
    seen.clear()
    assert run("channels_last=true", *short, "run_dir=two") == 0
    assert seen == [(torch.float32, 32, [True, True])]


def test_checkpoints_are_written_at_intervals_of_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default interval is ten minutes; in this test, each step takes four."""
    now, at, before = [0.0], [], Trainer._save

    def saved(trainer: Trainer, **how: bool) -> None:
        at.append((trainer.state.epoch, trainer.state.step))
        before(trainer, **how)

    def later(trainer: Trainer, *args: Any) -> None:
        now[0] += 240
        look(trainer, *args)

    look = Trainer._check_requests
    monkeypatch.setattr(Trainer, "_save", saved)
    monkeypatch.setattr(Trainer, "_check_requests", later)
    monkeypatch.setattr("qat_runner.training.loop.time.monotonic", lambda: now[0])
    assert run("epochs=1", "batch_size=8", "noise_batches=0") == 0
    assert at == [(0, 3), (0, 6), (1, 0)]


TAUGHT = ("recipe.distill=full_precision", "recipe.teacher=ok.pt")
WRONG = [
    (["--shell-completion"], "--shell-completion: must be one of install=, uninstall= and query="),
    (["--shell-completion", "install=foo"], "with bash, fish or zsh"),
    (["model=resnet5"], "model=resnet5: must be one of bert, bert_base, bert_large, decoder, mobilenet_v2"),
    (["clipping=octave"], "did you mean octav"),
    (["gradient=stee"], "gradient=stee: must be one of ewgs"),
    (["dataset=cifar"], "dataset=cifar: must be one of cifar10"),
    (["format=int_affine", "range=full"], "qat-run: range=full: is for plain integers, not for int_affine4"),
    (["format=int_affine", "clipping=pact"], "qat-run: clipping 'pact' is for plain integers, not for int_affine4"),
    (["bits=1"], "bits=1: must be 2 to 16, or 32"),
    (
        ["bits=auto", "policy=own.yaml", "budget=4"],
        "bits=auto: is short for policy=auto, so it cannot be combined with",
    ),
    (["bits=abc"], "bits=abc: must be an integer"),
    (["bits 4"], "bits 4: must be KEY=VALUE; qat-run --help lists all keys and flags"),
    (["trackers=wandb"], "trackers=wandb: must be a list: trackers=[wandb]"),
    (["trackers=[none,tensorboard]"], "trackers=[none,tensorboard]: none cannot be combined with other trackers"),
    (["recipe.scratch.schedul=cosine"], "did you mean recipe.scratch.schedule?"),
    (["gradient=ewgs", "gradient.options.delt=0.1"], "gradient 'ewgs' has no option 'delt', only delta"),
    (["clipping.sync=true", "log_excess_mse=true"], "clipping.sync=true: cannot be combined with log_excess_mse=true"),
    (["clipping.sync=true", "clipping.refine=8"], "clipping.sync=true: cannot be combined with clipping.refine=8"),
    (["clipping.options={multiple: 2}"], "clipping 'octav' has no option 'multiple', only iterations"),
    (["clipping.options.multiple=2"], "clipping 'octav' has no option 'multiple', only iterations"),
    (["model=resnet20", "dataset=imagenet"], "dataset=imagenet: not found in data_dir"),  # its recipe is deit
    (
        ["dataset=imagefolder", "dataset.image_size=32", "dataset.resize_size=16"],
        "must be dataset.image_size=32 or more",
    ),
    (
        ["-m", "mode=ptq,evaluate", "weights=ok.pt", "batch_size=null", "epochs=2"],
        "epochs=2: applies only to training, and mode=ptq does not train",
    ),
    (
        ["mode=evaluate", "weights=baseline", "bits=32", "lr=0.5"],
        "mode=evaluate does not train; recipe.scratch.lr=0.5 sets it for the full-precision baseline",
    ),
    (["mode=train"], "mode=train: must be one of auto, scratch, retrain, long_retrain, finetune, ptq"),
    (["amp=half"], "amp=half: must be one of none, bf16, fp16"),
    (["recipe.scratch.schedule=exp"], "recipe.scratch.schedule=exp: must be one of step, cosine, linear"),
    (["recipe.scratch.optimizer=lion"], "recipe.scratch.optimizer=lion: must be one of sgd, adamw"),
    (
        ["dataset=squad", "model=bert_base", "dataset.padding=none"],
        "dataset.padding=none: must be one of max_length",
    ),
    (["resume=no"], "resume=no: must be one of auto, force, never"),
    (["bits="], "bits=: must be an integer"),
    (["lr=fast"], "lr=fast: must be a number"),
    (["bitz=4"], "unknown key 'bitz'; did you mean bits?"),
    (["clipping.qq=1"], "unknown key 'clipping.qq'; did you mean clipping.q?"),
    (["clipping=[octav,max]"], "must be a single option; a sweep is qat-run -m clipping=octav,max"),
    (["clipping.k=2"], "unknown key 'clipping.k'; did you mean clipping.options.k?"),
    (["+clipping.k=2"], "unknown key 'clipping.k'; did you mean clipping.options.k?"),
    (["gradient=ewgs", "gradient.delta=0.1"], "unknown key 'gradient.delta'; did you mean gradient.options.delta?"),
    (["clipping.itertions=3"], "unknown key 'clipping.itertions'; did you mean clipping.iterations?"),
    (["model.bits=4"], "unknown key 'model.bits'; did you mean bits?"),
    (["weight_decay=0"], "unknown key 'weight_decay'; did you mean recipe.scratch.weight_decay?"),
    (["momentum=0"], "did you mean recipe.scratch.momentum or oscillations.momentum?"),
    (["dataset.path=data"], "unknown key 'dataset.path'; qat-run --help lists all keys"),
    (["mode=evalute"], "evaluate; did you mean evaluate?"),
    (["clipping.name=octva"], "did you mean octav?"),
    (["format=int_afine"], "did you mean int_affine?"),
    (["model.stem=smal"], "did you mean small?"),
    (["model.name=resnet_50"], "did you mean resnet50?"),
    (["dataset.name=digit"], "did you mean digits?"),
    (["trackers=[tensorbord]"], "did you mean tensorboard?"),
    (["rules=[{match: a, bit: 3}]"], "did you mean bits?"),
    (["+foo=1"], "unknown key 'foo'"),
    (["stand_in=digits"], "unknown key 'stand_in'; did you mean +stand_in=NAME?"),
    (["experiment=table2"], "unknown key 'experiment'; did you mean +experiment=NAME?"),
    (["row=octav"], "unknown key 'row'; did you mean +row=NAME?"),
    (["standin=digits"], "unknown key 'standin'; qat-run --help lists all keys"),
    (["-m", "+sweep.bits=2"], "sweep: can only be set in the files of experiments and stand-ins"),
    (["given=[dataset.mean]"], "given: cannot be set; the runner fills it in"),
    (["bits"], "bits: must be KEY=VALUE"),
    (["mode=retrain"], "needs weights"),
    (["mode=retrain", "weights=absent.pt"], "absent.pt: no such file"),
    (["mode=ptq", "weights=other.pt"], "weights=other.pt: too few tensors match"),
    (["mode=ptq", "weights=shape.pt"], "conv1.weight has shape [16, 3, 1, 1], not [16, 3, 3, 3]"),
    (["mode=ptq", "weights=garbage.pt"], "not a readable weights file"),
    (["dataset=cifar10"], "python -m qat_runner.data.prepare cifar10 DATA_DIR"),
    (["dataset=imagenet", "data_dir=nowhere", "model=resnet50"], "data_dir=nowhere; this folder"),
    (["clipping=percentile", "clipping.q=120"], "a percentile must lie in (0, 100]"),
    (["clipping=static_octav"], "mode=scratch has no trained weights to calibrate on"),
    (["mode=ptq", "weights=ok.pt", "clipping=static_max", "clipping.calibration_batches=0"], "needs data to calibrate"),
    (["mode=evaluate", "weights=ok.pt", "clipping=static_max"], "holds no clipping scalars for conv1.weight"),
    (["mode=evaluate", "weights=ok.pt", "clipping.eval_mode=last"], "holds no clipping scalars for conv1.input"),
    (["clipping=octav", "clipping.q=99"], "clipping 'octav' has no option 'q', only iterations"),
    (["clipping=null"], "must be a string or a list. Got NoneType"),
    (["hydra/launcher=nowhere"], "hydra/launcher=nowhere: there is no such launcher; is a plugin missing"),
    (["hydra/launcher=joblib"], "hydra/launcher=joblib: applies only to sweeps; qat-run -m starts one, even of one"),
    (["hydra/launcher=basic"], "hydra/launcher=basic: applies only to sweeps"),
    (["--resolve"], "--resolve: applies only to --cfg, which shows a config"),
    (["--package", "model"], "--package: applies only to --cfg, which shows a config"),
    (["--run", "-m"], "--run, -m, --cfg, --info and --shell-completion: only one of them can be given"),
    (["--run", "--cfg", "job"], "only one of them can be given"),
    (["hydra/sweeper=nowhere"], "cannot be set"),
    (["seed=99999999999999999999"], "seed"),
    (["dataset=squad", "recipe.scratch.schedule=step"], "recipe.scratch.schedule=step: the recipe has no such stage"),
    (["activation_granularity=token", "clipping=static_octav"], "activation_granularity=token: its scalars"),
    (["recipe.freeze_scalars_at=1", "epochs=1"], "recipe.freeze_scalars_at=1.0: must be above 0 and below epochs=1"),
    (["recipe.freeze_scalars_at=0.5", "clipping=lsq"], "clipping=lsq has no dynamic scalars to freeze"),
    (["recipe.freeze_scalars_at=0.5", "activation_bits=32"], "resnet8 has no dynamic activation scalars"),
    (["oscillations.freeze_to=0.2"], "oscillations.freeze_from=0.1: must be at least oscillations.freeze_to=0.2"),
    (["oscillations.measure=true", "bits=6"], "oscillations.max_bits=4: resnet8 has no weight of so few bits"),
    (["recipe.teacher_model=resnet56"], "recipe.teacher_model=resnet56: needs its weights, recipe.teacher=PATH"),
    ([*TAUGHT, "recipe.teacher_model=resnet57"], "recipe.teacher_model=resnet57: must be one of"),
    ([*TAUGHT, "recipe.teacher_model=resnet56"], "recipe.teacher=ok.pt: too few tensors match"),
    (["dataset=digits", "dataset.num_classes=5"], "dataset.num_classes=5: must be at least 10"),
    (["dataset=digits", "dataset.image_size=64"], "dataset.image_size=64: must divide 8"),
    (["dataset=cifar10", "data_dir=broken"], "broken cannot be read"),
    (["-m", "bits=4,8", "run_dir=one"], "run_dir=one: rows of the sweep that differ in activation_bits, weight_bits"),
    (["-m", "bits=4,8", "mode=ptq", "weights=other.pt"], "weights=other.pt: too few tensors match"),
    (["epochs=0"], "epochs=0: must be 1 to 100000"),
    (["device=cuda:99"], "device=cuda:99: this machine has"),
    (["device=tpu"], "device=tpu: must be auto, cpu, cuda or cuda:N"),
    (["device=cpu:0"], "device=cpu:0: must be auto, cpu, cuda or cuda:N"),
    (["device='cuda:'"], "device=cuda:: must be auto, cpu, cuda or cuda:N"),
    (["model.stem=large"], "model.stem=large: must be one of auto"),
    (["dataset.augment=mixup"], "dataset.augment=mixup: must be one of none"),
    (["run_dir=taken"], "run_dir=taken: holds no run, so it is left alone"),
    (["run_dir=garbage.pt/x"], "garbage.pt is a file, not a folder"),
    (["-m", "bits=4,8", "--cfg", "job"], "only one of them can be given"),
    (["--bits", "4"], "unrecognized arguments: --bits"),
    (["-m", "bits=4,1"], "bits=1: must be"),
    (["bits=4,8"], "bits=4,8: several values need a sweep, qat-run -m; a list is written bits=[4,8]"),
    (["-m", "bits=8,4", "mode=ptq,oops", "weights=ok.pt"], "mode=oops: must be one of"),
]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files and folders that the invalid commands name."""
    folder = tmp_path_factory.mktemp("things")
    state = build_model("resnet8", 10, 8).state_dict()
    torch.save(state, folder / "ok.pt")
    torch.save(build_model("resnet56", 10, 8).state_dict(), folder / "other.pt")
    torch.save(state | {"conv1.weight": torch.zeros(16, 3, 1, 1)}, folder / "shape.pt")
    (folder / "garbage.pt").write_text("no weights")
    for name in ("broken/cifar10.npz", "taken/thesis.tex"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_invalid_commands_are_rejected(
    run: Run, things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    assert run(*args) == 2
    # PyTorch's loggers may write a line about torchao in the test that imports it first.
    (expected,) = (line for line in capsys.readouterr().err.splitlines() if not re.match(r"W\d{4} ", line))
    assert expected.startswith("qat-run: ") and message in expected
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rules=[{match: layer9.*, bits: 3}]"], "rule 'layer9.*' matches no layer or tensor"),
        (["policy=auto", "budget=4", "rules=[{match: layer9.*, bits: 3}]"], "matches no layer or tensor"),
        (["oscillations.measure=true", "bits=6"], "resnet8 has no weight of so few bits"),
    ],
)
def test_what_the_network_does_not_allow_is_rejected_before_its_baseline_is_trained(
    words: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "run_after_others", lambda config: pytest.fail(f"{config.mode} was run"))
    assert run("mode=retrain", "weights=baseline", *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_folder_of_another_config_is_not_touched(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("epochs=1", "run_dir=mine") == 0
    capsys.readouterr()
    assert run("epochs=1", "seed=1", "run_dir=mine") == 2
    assert "run_dir=mine: holds a run with a different seed; overwrite=true replaces it" in capsys.readouterr().err
    assert json.loads(Path("mine/summary.json").read_text())["seed"] == 0


def test_overwrite_deletes_only_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("project").mkdir()
    Path("project/config.yaml").write_text("foo: 1\n")
    Path("project/thesis.tex").touch()
    assert run("epochs=1", "run_dir=project", "overwrite=true") == 2
    assert "holds no run, so it is left alone" in capsys.readouterr().err
    assert Path("project/thesis.tex").exists()
    assert run("epochs=1", "run_dir=mine") == 0
    Path("mine/notes.txt").touch()
    assert run("epochs=1", "run_dir=mine", "overwrite=true") == 2
    assert "holds more than a run (notes.txt)" in capsys.readouterr().err
    Path("mine/notes.txt").unlink()
    own = "weights=mine/checkpoints/last.pt"
    assert run("mode=retrain", own, "epochs=1", "run_dir=mine", "overwrite=true") == 2
    assert "overwrite=true would delete weights=" in capsys.readouterr().err
    assert Path("mine/summary.json").exists()


def test_weights_are_identified_by_their_content(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    assert run("mode=ptq", "weights=w.pt") == 0
    assert run("mode=ptq", f"weights={tmp_path / 'w.pt'}") == 0
    assert "is finished already" in capsys.readouterr().out
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    assert run("mode=ptq", "weights=w.pt") == 0
    assert "is finished already" not in capsys.readouterr().out
    assert len([path for path in Path("runs").iterdir() if path.is_dir()]) == 2


def test_scalars_for_other_bits_are_not_used(run: Run) -> None:
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    static = ["clipping=static_octav", "mode=retrain", "weights=w.pt", "epochs=1"]
    assert run(*static, "run_dir=four") == 0
    evaluate = ["mode=evaluate", "clipping=static_octav", "weights=four/checkpoints/last.pt"]
    assert run(*evaluate, "run_dir=same") == 0
    assert run(*evaluate, "bits=8", "run_dir=other") == 2
    retrain = ["mode=retrain", "weights=four/checkpoints/last.pt", "epochs=1"]
    assert run(*retrain, "conv_granularity=tensor", "run_dir=granularity") == 0
    same, four = (json.loads(Path(d, "summary.json").read_text()) for d in ("same", "four"))
    assert same["loss"] == four["loss"]


def test_resuming_keeps_the_first_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("epochs=1", "run_dir=mine") == 0
    first = json.loads(Path("mine/environment.json").read_text())
    Path("mine/summary.json").unlink()
    assert run("epochs=1", "run_dir=mine") == 0
    again = json.loads(Path("mine/environment.json").read_text())
    assert len(again.pop("resumed")) == 1 and first.pop("resumed") == []
    assert again == first


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_damaged_records_are_reported(run: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run("epochs=1", "run_dir=mine") == 0
    Path("mine", name).write_text("{half: [")
    assert run("epochs=1", "run_dir=mine") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "mine" in message


def test_a_damaged_checkpoint_is_reported(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("epochs=1", "run_dir=mine") == 0
    Path("mine/summary.json").unlink()
    Path("mine/checkpoints/last.pt").write_bytes(b"half")
    assert run("epochs=1", "run_dir=mine") == 1
    assert "last.pt cannot be read" in capsys.readouterr().err


def test_help_and_config_do_no_work(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cfg", "job") == 0
    assert "weight_bits: null" in capsys.readouterr().out
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for word in ("Examples", "qat-run -m bits=4,6,8", "clipping: lsq, max, mse_sweep, octav", "weight_bits: null"):
        assert word in shown
    assert run("--version") == 0
    assert capsys.readouterr().out == f"qat-run {version('qat_runner')}\n"
    assert list(tmp_path.iterdir()) == []


def test_logging_does_not_change_other_loggers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    root, ours, mine = logging.getLogger(), logging.getLogger("qat_runner"), logging.NullHandler()
    monkeypatch.setattr(ours, "handlers", [mine])
    handlers, level = list(root.handlers), ours.level
    assert run("epochs=1", "limit_train_batches=1") == 0
    assert run("bits=1") == 2
    assert root.handlers == handlers
    assert (ours.handlers, ours.propagate, ours.level) == ([mine], True, level)
