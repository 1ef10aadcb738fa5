"""Decoders on text from the command line, with tiny networks and a tiny text."""

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qat_runner import ranks
from qat_runner.cli import export, report
from qat_runner.cli.run import main
from tests.cli.commands import Run, run_in
from tests.outcome import result, same
from tests.tiny import byte_tokenizer, tiny_decoder, tiny_text
from tests.training.processes import together

SMALL = [
    *("backend=eager", "model=decoder", "model.checkpoint=small", "dataset=text", "data_dir=data", "trackers=[]"),
    *("dataset.max_length=16", "batch_size=4", "limit_train_batches=2", "noise_batches=0", "lr=1e-3"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = run_in(tmp_path, monkeypatch, SMALL)
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    tiny_decoder(Path("small"), layers=1)
    tiny_text(Path("data/text"), sentences=16)
    return run


def summary(folder: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text())
    return read


def perplexity_of_transformers(folder: Path, length: int) -> float:
    """Return the perplexity of val.txt, computed block by block in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = torch.tensor(byte_tokenizer()(Path("data/text/val.txt").read_text())["input_ids"])
    nats = 0.0
    for start in range(0, len(ids) - 1, length):
        block = ids[start : start + length + 1]
        with torch.no_grad():
            logits = model(block[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, block[1:], reduction="sum").item()
    return math.exp(nats / (len(ids) - 1))


def test_perplexity_is_that_of_the_network_on_the_whole_text(run: Run) -> None:
    weights = ["bits=32", "mode=evaluate", "weights=small/model.safetensors"]
    assert run(*weights, "dataset.val_batch_size=5", "run_dir=same") == 0
    expected = perplexity_of_transformers(Path("small"), 16)
    assert summary("same")["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert summary("same")["perplexity"] == pytest.approx(math.exp(summary("same")["loss"]))


def test_the_record_and_the_html_reports(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bits=4", "epochs=2", "accumulate=3", "amp=bf16", "run_dir=four", "noise_batches=1") == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "perplexity %" not in out and "block/s" in out
    assert "Linear lm_head, softmax" in out  # in full precision
    with open("four/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_perplexity"} <= rows[0].keys()
    found = summary("four")
    assert found["metric"] == "perplexity"
    assert found["best_perplexity"] == min(float(row["val_perplexity"]) for row in rows)
    best = torch.load("four/checkpoints/best.pt", weights_only=True)
    assert best["state"]["best"] == found["best_perplexity"]

    assert run("bits=32", "epochs=2", "run_dir=full") == 0
    assert report.main(["four"]) == 0
    page = Path("four/report.html").read_text()
    assert "Perplexity (lower is better)" in page and f"best {found['best_perplexity']:.2f}" in page
    assert report.main(["compare", "four", "full"]) == 0
    page = Path("report/compare.html").read_text()
    assert "Perplexity (lower is better) against bits" in page and "perplexity %" not in page
    assert report.main(["status", "."]) == 0
    assert f"perplexity {found['perplexity']:.2f}" in capsys.readouterr().out


def test_the_best_epoch_is_the_one_with_the_lowest_perplexity(run: Run) -> None:
    """The learning rate is so high that the network gets worse."""
    assert run("bits=32", "epochs=3", "lr=0.3", "recipe.finetune.warmup_epochs=0", "run_dir=worse") == 0
    with open("worse/metrics.csv", newline="") as file:
        values = [float(row["val_perplexity"]) for row in csv.DictReader(file)]
    best = torch.load("worse/checkpoints/best.pt", weights_only=True)["state"]
    assert best["best"] == min(values) < max(values)
    assert best["epoch"] == values.index(min(values)) + 1


def test_an_interrupted_run_ends_like_an_uninterrupted_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_runner.training.loop import Trainer

    tiny_decoder(Path("small"), "gpt2", layers=1)  # with dropout, and tied weights
    assert run("epochs=2", "run_dir=whole") == 0
    step = Trainer._step

    def interrupt(trainer: Trainer, batch: Any) -> torch.Tensor:
        if trainer.state.epoch == 1:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", interrupt)
    assert run("epochs=2", "run_dir=broken") == 130
    monkeypatch.setattr(Trainer, "_step", step)
    assert run("epochs=2", "run_dir=broken") == 0
    assert same(result(Path("whole")), result(Path("broken")))


def test_from_random_weights_to_a_distilled_network(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The full-precision network is the only teacher: labels are not used."""
    tiny_decoder(Path("bare"), layers=1, weights=False)
    scratch = ["model.checkpoint=bare", "recipe=text_scratch", "recipe.scratch.epochs=1", "recipe.retrain.epochs=1"]
    taught = ["recipe.distill=full_precision", "recipe.distill_weight=1.0", "recipe.distill_temperature=1.0"]
    kept = ["runs_dir=kept", "run_dir=taught"]
    assert run(*scratch, "mode=retrain", "weights=baseline", "bits=8", *taught, *kept) == 0
    (request,) = re.findall("it is the same as: (qat-run .*)", capsys.readouterr().out)
    assert "bits=32" in request and request.endswith(" runs_dir=kept")
    assert summary("taught")["distilled"] and summary("taught")["mode"] == "retrain"
    (full,) = Path("kept").glob("decoder_text_scratch_fp32_*")
    weights = f"weights={full}/checkpoints/last.pt"
    assert run(*scratch, "mode=ptq", "bits=4", "clipping=static_octav", weights, "run_dir=ptq") == 0
    assert run(*scratch, "mode=evaluate", "bits=32", weights, "run_dir=same") == 0
    assert summary("same")["perplexity"] == pytest.approx(summary(str(full))["perplexity"])
    with open("taught/steps.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert all(0 <= loss < 0.1 for loss in losses)  # the divergence from the teacher, in nats; the loss on text is 5.5


@pytest.mark.slow
def test_exported_files_do_what_the_network_does(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert run("bits=8", "epochs=1", "run_dir=eight") == 0
    assert export.main(["eight", "--formats", "onnx", "safetensors"]) == 0
    exported = json.loads(Path("eight/export/export.json").read_text())
    assert exported["figures"]["dynamic"]["accuracy"] == pytest.approx(summary("eight")["perplexity"])
    assert exported["figures"]["onnx"]["agreement"] > 99  # of tokens
    assert "perplexity %" not in capsys.readouterr().out
    described = json.loads(Path("eight/export/model.json").read_text())
    assert (described["inputs"], described["outputs"]) == (["input_ids"], ["logits"])


def trained() -> dict[str, Any]:
    sys.argv = ["qat-run"]
    assert main([*SMALL, "bits=32", "batch_size=8", "epochs=1", "dataset.val_batch_size=3", "run_dir=shared"]) == 0
    return {key: summary("shared")[key] for key in ("loss", "perplexity", "accuracy")} if ranks.is_main() else {}


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(run: Run, tmp_path: Path) -> None:
    one, _ = together(trained, 2, tmp_path)
    assert run("bits=32", "batch_size=8", "epochs=1", "dataset.val_batch_size=3", "run_dir=alone") == 0
    for key, value in one.items():
        assert value == pytest.approx(summary("alone")[key], rel=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model=resnet18"], "model=resnet18: does not support dataset=text; must be one of decoder"),
        (["model=bert"], "model=bert: does not support dataset=text; must be one of decoder"),
        (["dataset=digits"], "model=decoder: does not support dataset=digits; must be one of resnet18"),
        (["model.checkpoint=null"], "model=decoder: needs model.checkpoint=FOLDER or a name on the Hugging Face hub"),
        (["model.checkpoint=data"], "model.checkpoint=data: the folder contains no config.json"),
        (["dataset.max_length=100"], "dataset.max_length=100: must be at most 64, the number of positions of small"),
        (
            ["data_dir=elsewhere"],
            "this folder (or elsewhere/text) must contain train.txt and val.txt, or folders",
        ),
        (["mode=ptq", "weights=nowhere.pt"], "weights=nowhere.pt: "),
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


def test_a_text_that_is_too_short_is_rejected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/text/train.txt").write_text("short")
    assert run("epochs=1") == 2
    assert "train has 5 tokens; must have at least 17: a block and the token after it" in capsys.readouterr().err
