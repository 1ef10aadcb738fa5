"""BERT on SQuAD from the command line, with a tiny network and a tiny file."""

import csv
import json
import re
from pathlib import Path

import pytest

from qat_runner.cli import report
from qat_runner.cli.run import main
from tests.cli.commands import Run, run_in
from tests.tiny import tiny_bert, tiny_squad

SMALL = [
    *("backend=eager", "model=bert", "model.checkpoint=bert", "dataset=squad", "data_dir=data"),
    *("dataset.max_length=32", "dataset.stride=8", "batch_size=8", "clipping.calibration_batches=1"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = run_in(tmp_path, monkeypatch, SMALL)
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    tiny_bert(Path("bert"))
    tiny_squad(Path("data/squad"))
    return run


def only_run() -> Path:
    (folder,) = Path("runs").iterdir()
    return folder


@pytest.mark.plots
def test_the_record_of_fine_tuning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bits=4", "epochs=2", "lr=1e-3") == 0
    folder = only_run()
    out = capsys.readouterr().out
    assert folder.name.startswith("bert_squad_finetune_4bit_octav_mph_seed0_")
    assert "f1 %" in out and "win/s" in out and "Linear qa_outputs, softmax" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "f1"
    assert {"em", "f1", "best_f1", "loss", "samples_per_second"} <= summary.keys()
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]][:6] == ["epoch", "train_loss", "train_exact", "val_loss", "val_em", "val_f1"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    predictions = json.loads((folder / "predictions.json").read_text())
    dev = json.loads(Path("data/squad/dev-v1.1.json").read_text())
    questions = {qa["id"]: p["context"] for p in dev["data"][0]["paragraphs"] for qa in p["qas"]}
    assert predictions.keys() == questions.keys()
    assert all(text in questions[key] for key, text in predictions.items())
    with open(folder / "layers.csv", newline="") as file:
        assert sum(row["epoch"] == "2" for row in csv.DictReader(file)) == 2 * 16
    for plot in ("curves.png", "noise.png"):
        assert (folder / plot).stat().st_size > 10_000


def test_an_interrupted_run_ends_like_an_uninterrupted_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_runner.training.loop import Trainer

    assert run("epochs=2", "run_dir=whole") == 0
    record, stop = Trainer._record_epoch, KeyboardInterrupt()

    def interrupt(trainer: Trainer, train: dict[str, float]) -> None:
        if trainer.state.epoch == 2:
            raise stop
        record(trainer, train)

    monkeypatch.setattr(Trainer, "_record_epoch", interrupt)
    assert run("epochs=2", "run_dir=broken") == 130
    monkeypatch.setattr(Trainer, "_record_epoch", record)
    assert run("epochs=2", "run_dir=broken") == 0
    whole, broken = (json.loads(Path(f"{name}/summary.json").read_text()) for name in ("whole", "broken"))
    for key in ("loss", "em", "f1", "sqnr_db", "quantization_mse"):
        assert whole[key] == broken[key]
    assert Path("whole/predictions.json").read_text() == Path("broken/predictions.json").read_text()


def test_a_fine_tuned_network_is_quantized_retrained_and_distilled(run: Run) -> None:
    assert run("bits=32", "epochs=1", "run_dir=full") == 0
    weights = "weights=full/checkpoints/last.pt"
    assert run("bits=6", "mode=ptq", "clipping=static_octav", weights, "run_dir=ptq") == 0
    assert run("bits=4", "mode=retrain", weights, "recipe.distill=full_precision", "epochs=1", "run_dir=retrain") == 0
    assert run("bits=32", "mode=evaluate", weights, "run_dir=same") == 0
    distilled = ["recipe.distill=full_precision", "recipe.teacher=full/checkpoints/last.pt"]
    assert run("bits=4", "epochs=1", "limit_train_batches=1", *distilled, "run_dir=taught") == 0
    full, same = (json.loads(Path(f"{name}/summary.json").read_text()) for name in ("full", "same"))
    assert (full["f1"], full["loss"]) == pytest.approx((same["f1"], same["loss"]))
    assert json.loads(Path("retrain/summary.json").read_text())["distilled"]


@pytest.mark.parametrize("clipping", ["static_mse_sweep", "static_percentile", "max", "lsq", "pact"])
def test_every_clipping_method_trains(run: Run, clipping: str) -> None:
    assert run(f"clipping={clipping}", "epochs=1", "limit_train_batches=2", "limit_val_batches=1", "accumulate=2") == 0


@pytest.mark.slow
def test_table5_and_the_figures_of_bert(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["-m", "+experiment=table5", "+stand_in=short_squad", "bits=4", "epochs=1", "dataset.train_questions=16"]
    assert run(*args) == 0
    table = capsys.readouterr().out.split("f1 %")[-1].split("\n\n")[0]
    assert len(table.splitlines()) - 2 == 8
    assert report.main(["table5", "runs"]) == 0
    out = capsys.readouterr().out
    assert "f1 % (ours)" in out and "SQuAD v1.1" in out
    assert re.search(r"\| bert_base +\| 32 .* 88.24 ", out)  # published
    assert re.search(r"\| bert +\| 4 +\| OCTAV \(MPH\) +\| \d", out)
    assert "No results for bert_large, bert_base." in out
    (folder,) = Path("runs").glob("*_fp32_*")
    assert report.main(["figure5", "--run", str(folder)]) == 0
    with open("report/figure5.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6
    assert {row["tensor"].rpartition(".")[2] for row in rows} == {"input"}  # operands of products are left out
    assert report.main(["figure2", "--run", str(folder)]) == 0
    with open("report/figure2.csv", newline="") as file:
        tensors = {row["tensor"] for row in csv.DictReader(file)}
    assert len(tensors) == 2 * (6 + 6 + 4)
    assert report.main(["table6", "--run", str(folder)]) == 0
    with open("report/table6.csv", newline="") as file:
        numbers = {(row["tensors"], row["number"]) for row in csv.DictReader(file)}
    assert numbers == {("weights", "12"), ("weights", ""), ("activations", "80"), ("activations", "")}  # 4 batches
    assert report.main(["figure5"]) == 2
    assert "figure5: needs --run RUN_DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_every_row_of_table5(run: Run) -> None:
    """Run all rows, of both networks at 4 to 8 bits, for two batches, with a tiny checkpoint for the published ones."""
    short = ["epochs=1", "limit_train_batches=2", "limit_val_batches=1", "noise_batches=0"]
    assert main(["-m", "+experiment=table5", *SMALL[2:], "backend=eager", *short]) == 0
    assert len([*Path("runs").glob("*/summary.json")]) == 2 * (1 + 5 * 7)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["model=resnet18"],
            "model=resnet18: does not support dataset=squad; must be one of bert_base, bert_large, bert",
        ),
        (["dataset=digits"], "model=bert: does not support dataset=digits; must be one of resnet18"),
        (["model.checkpoint=null"], "model=bert: needs model.checkpoint=FOLDER or a name on the Hugging Face hub"),
        (["model.checkpoint=nowhere/at/all"], "model.checkpoint=nowhere/at/all: must be a folder with a BERT"),
        (["dataset.max_length=100"], "dataset.max_length=100: must be at most 64, the number of positions of bert"),
        (["dataset.max_length=8"], "leaves no room for its paragraph"),
        (["data_dir=elsewhere"], "this folder (or elsewhere/squad) must contain train-v1.1.json and dev-v1.1.json"),
        (["mode=ptq", "weights=bert/model.safetensors"], "weights=bert/model.safetensors: too few tensors match"),
    ],
)
def test_invalid_commands_are_rejected(
    run: Run, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_a_different_checkpoint_is_a_different_run(run: Run) -> None:
    tiny = ["epochs=1", "limit_train_batches=1", "limit_val_batches=1"]
    assert run(*tiny) == 0
    Path("bert").rename("elsewhere")
    assert run(*tiny, "model.checkpoint=elsewhere") == 0  # with the same content
    assert len([*Path("runs").iterdir()]) == 1
    tiny_bert(Path("bert"), layers=1)
    assert run(*tiny) == 0
    assert len([*Path("runs").iterdir()]) == 2
