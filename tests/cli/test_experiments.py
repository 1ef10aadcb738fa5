"""Every experiment config on images, run for two batches per row, and qat-report on the results."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from qat_runner.cli import report
from qat_runner.cli import run as cli_run
from qat_runner.cli.run import config_dir, main
from qat_runner.data.imagenet import FIRST_CLASS, LAST_CLASS

OTHERS = {"table5", "decoder", "estimators"}
"""Experiments on texts, and one that takes a long time."""
EXPERIMENTS = sorted({path.stem for path in (config_dir() / "experiment").glob("*.yaml")} - OTHERS)
REPORTED = [name for name in EXPERIMENTS if name != "mobilenet"]
"""Experiments for which qat-report makes a table."""
SHORT = ["limit_train_batches=2", "limit_val_batches=1", "backend=eager", "batch_size=16", "dataset.val_batch_size=20"]
ROWS = {
    "table1": 6,
    "table2": 7,
    "table3": 8,
    "table4": 3,
    "learned": 10,
    "distillation": 2,
    "mobilenet": 9,
    "estimators": 12,
}

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *args: main(["-m", *args, *SHORT])


LONG = {"distillation", "learned", "mobilenet", "table1", "table2", "table3"}
"""Experiments that take longest."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in REPORTED])
def test_every_row_runs_and_is_reported(name: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    network = "mobilenet_v3_small" if name == "distillation" else "resnet8"
    args = [f"+experiment={name}", "+stand_in=digits", f"model={network}", "epochs=1"]
    assert run(*args) == 0
    table = capsys.readouterr().out.split("top1 %")[-1].split("\n\n")[0]
    assert len(table.splitlines()) - 2 == ROWS[name]
    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/summary.json")}
    assert run(*args) == 0  # finished rows are skipped
    assert {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/summary.json")} == before

    capsys.readouterr()
    assert report.main([name, "runs"]) == 0
    out = capsys.readouterr().out
    missing = re.search(r"Missing: (.*)", out)
    with open(f"report/{name}.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == network]
    if name == "distillation":  # the table has a row for the initial weights, the experiment has none
        assert missing is not None and missing[1] == "mobilenet_v3_small, Full precision (start)."
    else:
        assert missing is None
    assert sum(row["seeds"] == "1" for row in rows) == ROWS[name]
    assert "\\toprule" in Path(f"report/{name}.tex").read_text()
    assert "<table>" in Path(f"report/{name}.html").read_text()


@pytest.mark.parametrize("name", [*sorted(LONG), "estimators"])
def test_every_row_is_accepted(name: str, run: Run) -> None:
    args = ["-m", f"+experiment={name}", "+stand_in=digits", "model=resnet8", "epochs=1", *SHORT]
    assert len(cli_run._check_all([*args, *cli_run._rows_of_experiment(args, True)])) == ROWS[name]


def test_seeds_are_averaged_and_runs_of_other_settings_left_out(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["+experiment=table1", "+stand_in=digits", "+row=full_precision,octav"]
    assert run(*args, "seed=0,1", "epochs=1") == 0
    capsys.readouterr()
    assert report.main(["table1", "runs"]) == 0
    out = capsys.readouterr().out
    assert report.main(["table1", "runs", "--model", "resnet50"]) == 0
    assert "resnet8" not in capsys.readouterr().out
    assert " ± " in out and "Missing: resnet8, Max-scaled, 4 bits; " in out
    assert report.main(["figure4", "runs"]) == 0
    assert Path("report/figure4.svg").stat().st_size > 10_000
    assert run(*args, "seed=2", "epochs=2") == 0
    capsys.readouterr()
    assert report.main(["table1", "runs"]) == 0
    again = capsys.readouterr().out
    assert again.count(" (epochs)") == 2 and "Left out" in again
    assert again.partition("\n\nData")[0] == out.partition("\n\nData")[0]


def test_an_experiment_needs_m_and_a_stand_in_needs_an_experiment(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+experiment=table1"]) == 2
    assert "experiment=table1: has several rows; qat-run -m runs them all" in capsys.readouterr().err
    assert run("+stand_in=digits") == 2
    assert "stand_in=digits: needs +experiment=NAME" in capsys.readouterr().err
    assert run("+scale=digits") == 2
    text = capsys.readouterr()
    assert "+scale=digits has been renamed to +stand_in=digits" in text.out and "stand_in=digits: needs" in text.err
    for several in ("+experiment=table1,table2", "+experiment=[table1,table2]"):
        assert run(several) == 2
        assert f"{several[1:]}: must be a single one, since each has its own rows" in capsys.readouterr().err
    assert run("+experiment=table1", "+stand_in=digits,cifar10") == 2
    assert "stand_in=digits,cifar10: must be a single one" in capsys.readouterr().err
    assert run("+experiment=table7") == 2
    assert "table7: must be one of decoder, distillation, estimators, learned, mobilenet" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_an_experiment_is_shown_without_m(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags and overrides may have any order; keys in which the rows differ are left out."""
    for words in (["--cfg", "job", "bits=6", "+experiment=table1"], ["+experiment=table1", "--cfg", "job", "bits=6"]):
        assert main(words) == 0
        shown = capsys.readouterr()
        assert "\nbits: 6\n" in shown.out and not shown.err
    assert main(["+experiment=table1", "--help"]) == 0
    assert "Examples" in capsys.readouterr().out
    assert not list(Path().iterdir())


def test_invalid_commands_of_qat_report_are_rejected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["table1", "nowhere"]) == 2
    assert "nowhere: no such folder of runs" in capsys.readouterr().err
    Path("runs").mkdir()
    assert report.main(["table1"]) == 2
    assert "runs: holds no run of qat-run" in capsys.readouterr().err
    assert report.main(["figure2", "--model", "resnet8", "--dataset", "digits"]) == 2
    assert "figure2: needs --run RUN_DIR, or --model NAME --weights FILE --dataset NAME" in capsys.readouterr().err
    for option, value, sentence in (
        ("--model", "resnet21", "--model resnet21: must be one of resnet18, "),
        ("--dataset", "squad", "--dataset squad: must be one of "),
        ("--weights", "nowhere.pth", "weights=nowhere.pth: no such file"),
    ):
        named = {"--model": "resnet8", "--dataset": "digits", "--weights": "w.pth", option: value}
        assert report.main(["figure2", *(word for pair in named.items() for word in pair)]) == 2
        assert sentence in capsys.readouterr().err
    assert report.main(["figure1", "--run", "runs"]) == 2
    assert "runs: holds no run with a checkpoint" in capsys.readouterr().err
    assert report.main(["table9"]) == 2
    assert "table9: must be the folder of a run or one of compare, methods, results" in capsys.readouterr().err
    assert not Path("report").exists()


OF_RUN = ("--run", "one")
OF_WEIGHTS = ("--model", "resnet8", "--weights", "one/checkpoints/last.pt", "--dataset", "digits")


@pytest.mark.parametrize(
    "figures",
    [
        [("figure3",), ("iterations", *OF_RUN)],
        pytest.param(
            [
                ("figure1",),
                ("figure1", *OF_RUN),
                ("figure2", *OF_WEIGHTS),
                ("ranges",),
                ("figure5", *OF_RUN),
                ("iterations",),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["of a run", "others"],
)
def test_figures(figures: list[tuple[str, ...]], run: Run) -> None:
    assert main(["model=resnet8", *SHORT, "epochs=1", "run_dir=one"]) == 0
    for args in figures:
        assert report.main(args) == 0
        assert all(Path(f"report/{args[0]}{suffix}").stat().st_size > 10_000 for suffix in (".png", ".svg"))


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in the layout of ImageNet: 1000 classes with one small image each, in both splits."""
    folder = tmp_path_factory.mktemp("imagenet")
    names = [FIRST_CLASS, *(f"n{2_000_000 + i:08d}" for i in range(998)), LAST_CLASS]
    chance = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            image = Image.fromarray(chance.integers(0, 255, (40, 40, 3), dtype=np.uint8))
            image.save(folder / split / name / f"{name}.JPEG")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_on_imagenet(name: str, run: Run, imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all networks and rows of the table for two batches, with random weights in place of the published ones."""
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", _fresh)
    options = ["dataset.image_size=32", "dataset.workers=0", "noise_batches=0", "epochs=1", f"data_dir={imagenet}"]
    assert run(f"+experiment={name}", *options, "model.stem=imagenet") == 0


def _fresh(weights: torchvision.models.WeightsEnum, *args: object, **kwargs: object) -> object:
    name = type(weights).__name__.removesuffix("_Weights").lower()
    return torchvision.models.get_model({"resnet18": "resnet18"}.get(name, name)).state_dict()
