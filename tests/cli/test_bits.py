"""qat-bits and bits=auto, from the command to the run folder."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from qat_runner import ranks
from qat_runner.allocation import Prices
from qat_runner.allocation import price as real_price
from qat_runner.cli import bits, report
from qat_runner.cli import run as cli_run
from qat_runner.config import allocation_of, from_hydra, load_config, run_name
from qat_runner.config.composing import command, compose_config
from qat_runner.experiment import allocating
from qat_runner.experiment.probing import first_that_holds
from qat_runner.experiment.running import _log_notes_once
from qat_runner.models import build_model
from qat_runner.runs.records import ALLOCATION, SUMMARY
from tests.cli.commands import Run, run_in

SMALL = [
    *("backend=eager", "model=resnet20", "dataset=digits", "limit_train_batches=2", "limit_val_batches=1"),
    *(
        "clipping.refine=0",
        "trackers=[]",
        "allocation.batches=2",
        "allocation.batch_size=8",
        "allocation.widths=[2,4,8]",
    ),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return run_in(tmp_path, monkeypatch, SMALL)


def allocated(folder: Path) -> dict[str, int]:
    """Return the bit-width of each tensor in policy.yaml."""
    return {rule["match"]: rule["bits"] for rule in yaml.safe_load((folder / "policy.yaml").read_text())["rules"]}


def only(pattern: str) -> Path:
    (found,) = Path("runs").glob(pattern)
    return found


def test_bits_are_chosen_before_training(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    retrain = ["bits=auto", "budget=4", "mode=retrain", "weights=baseline", "epochs=1"]
    assert run(*retrain) == 0
    chosen, trained = only("*_allocate_budget4_*"), only("*_retrain_budget4_*")
    config, record = load_config(trained), ALLOCATION.read(chosen)
    assert config is not None and record is not None
    log = capsys.readouterr().out
    shared = "it is the same as: qat-run model=resnet20 dataset=digits bits=32 limit_train_batches=2 limit_val"
    assert shared in log and "bits=auto: bit-widths are chosen for trained weights" not in log
    rules = allocated(chosen)
    assert {rule["match"]: rule["bits"] for rule in config.allocated} == rules and len(rules) == 40
    assert {rules[name] for name in ("conv1.weight", "conv1.input", "linear.weight", "linear.input")} == {8}
    assert "bits=auto mode=retrain model=resnet20" in (chosen / "policy.yaml").read_text()
    assert set(rules.values()) <= {2, 4, 8} and len(set(rules.values())) > 1
    table = (trained / "quantizers.txt").read_text().splitlines()
    first = next(line.split() for line in table if line.startswith("layer1.0.conv1 "))
    assert int(first[2]) == rules["layer1.0.conv1.weight"]
    assert record["chosen"]["costs"]["mean bits of weights"] <= 4 + 1e-9
    assert record["chosen"]["rise"] <= record["uniform"][1]["rise"] and record["uniform"][1]["width"] == 4
    assert [point["value"] is not None for point in record["uniform"]] == [False, True, False]
    assert record["answer"].startswith("resnet20 on digits with budget=4 has ") and record["answer"] in log
    assert (chosen / "prices.csv").read_text().count("\n") == 1 + 40 and record["beside"] == "measured"
    assert (chosen / "bits.png").read_bytes().startswith(b"\x89PNG")
    summary = SUMMARY.read(chosen)
    assert summary is not None and summary["mode"] == "allocate" and summary["answer"] == record["answer"]

    again = (chosen / "summary.json").stat().st_mtime_ns
    assert run(*retrain, "seed=0") == 0  # both are finished already
    assert (chosen / "summary.json").stat().st_mtime_ns == again
    assert report.main([str(chosen)]) == 0
    page = (chosen / "report.html").read_text()
    assert record["answer"] in page and "average of weights / activations" in page


@pytest.mark.slow
def test_a_search_for_the_fewest_bits_resumes_where_it_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["mode=allocate", "weights=baseline", "max_drop=90", "allocation.cost=size_mb", "allocation.widths=[2,8]"]
    assert run(*words, "run_dir=sought") == 0
    record = json.loads(Path("sought/allocation.json").read_text())
    assert record["cost"] == "size_mb" and "uniform needs 2 bits" in record["answer"]  # every network is good enough
    probes = {path: path.stat().st_mtime_ns for path in Path("sought/probes").glob("*/summary.json")}
    assert len(probes) >= 2
    for name in ("summary.json", "allocation.json"):
        Path("sought", name).unlink()
    assert sum(point["value"] is not None for point in record["uniform"]) >= 2  # those measured in the search
    assert run(*words, "run_dir=sought") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("sought/probes").glob("*/summary.json")} == probes
    assert json.loads(Path("sought/allocation.json").read_text())["answer"] == record["answer"]


@pytest.mark.parametrize("enough", [0, 1, 5, 9, 10])
def test_bisection_finds_the_first_that_is_good_enough(enough: int) -> None:
    asked: list[int] = []
    found = first_that_holds(range(10), lambda n: asked.append(n) or n >= enough)  # type: ignore[func-returns-value]
    assert found == (enough if enough < 10 else None) and len(asked) <= 5
    assert first_that_holds([], bool) is None


def test_qat_bits_is_qat_run_with_mode_allocate(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("qat_runner.cli.run.main", lambda args, command: asked.extend([command, *args]) or 0)
    assert bits.main(["-m", "budget=3,4"]) == 0
    assert asked == ["qat-bits", "mode=allocate", "-m", "budget=3,4"]
    bits.main(["--help"])
    assert "budget=4.0" in capsys.readouterr().out


def test_messages_of_qat_bits_name_qat_bits(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert bits.main(["mode=ptq", "budget=4"]) == 2
    assert capsys.readouterr().err == "qat-bits: mode=ptq: must be mode=allocate; use qat-run for other modes\n"
    assert bits.main(["--cfg", "job", "model=resnet8", "weights=w.pt", "budget=4"]) == 0
    assert "\nmode: allocate\n" in capsys.readouterr().out
    assert bits.main(["budgett=4"]) == 2
    assert capsys.readouterr().err == "qat-bits: unknown key 'budgett'; did you mean budget?\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mode=allocate", "weights=baseline"], "mode=allocate: needs a limit: budget, size_mb"),
        (["bits=auto"], "bits=auto: needs a limit: "),
        (["mode=allocate", "budget=4"], "mode=allocate: needs weights="),
        (["budget=4"], "budget=4: applies only to qat-bits and bits=auto"),
        (["-m", "bits=4,auto", "budget=4"], "bits=4,auto: auto cannot be combined with other values"),
        (["retrain_steps=5"], "retrain_steps=5: applies only to qat-bits"),
        (["bits=auto", "budget=4", "max_drop=1"], "max_drop=1: cannot be combined with budget, since it finds the"),
        (["bits=auto", "budget=1"], "budget=1.0: must be 2 to 16"),
        (["mode=allocate", "weights=baseline", "budget=4", "bits=32"], "mode=allocate has nothing to choose, since"),
        (["bits=auto", "budget=4", "allocation.widths=[4]"], "allocation.widths=[4]: must be two or more"),
        (["bits=auto", "budget=4", "allocation.price=hessian"], "allocation.price=hessian: must be one of gradient"),
        (
            ["bits=auto", "budget=4", "bits=6"],
            "bits=6: cannot be set with bits=auto, which chooses bit-widths; rules=[{match: GLOB, bits: 6}] sets",
        ),
        (["bits=auto", "budget=4", "weight_bits=4"], "weight_bits=4: cannot be set with bits=auto, which chooses"),
        (
            ["mode=allocate", "weights=baseline", "budget=4", "activation_bits=8"],
            "activation_bits=8: cannot be set with mode=allocate, which chooses",
        ),
        (["mode=allocate", "bits=auto", "budget=4", "weights=baseline"], "bits=auto: cannot be set with mode=allocate"),
        *(
            (["mode=allocate", "weights=baseline", "budget=4", word], f"{word}: cannot be set with mode=allocate;")
            for word in ("lr=0.5", "batch_size=8", "epochs=9")
        ),
        (["bits=auto", "latency_ms=4"], "latency_ms: needs allocation.latencies=FILE"),
        (["bits=auto", "latency_ms=4", "allocation.latencies=none.json"], "allocation.latencies=none.json: must be a"),
    ],
)
def test_invalid_commands_are_rejected_before_any_work(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert run(*words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs").exists()


def test_bits_in_old_records_are_still_read(tmp_path: Path) -> None:
    """Such bits had no effect, but were part of the identity of a run."""
    config = from_hydra(compose_config(["policy=auto", "budget=4"]))
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(replace(config, weight_bits=6))))
    old = load_config(tmp_path)
    assert old is not None and run_name(old) != run_name(config) and command(old) is None
    assert allocation_of(old).weight_bits == 6


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["policy=auto", "budget=3.5", "mode=ptq", "weights=w.pt"], "qat-run {} policy=auto budget=3.5 mode=ptq {}"),
        (["mode=allocate", "max_drop=0.5", "weights=w.pt"], "qat-bits {} max_drop=0.5 {}"),
        (["mode=allocate", "size_mb=1", "weights=w.pt", "weight_bits=32"], "qat-bits {} size_mb=1.0 {} weight_bits=32"),
        (
            ["mode=allocate", "latency_ms=2", "allocation.latencies=ms.json", "weights=w.pt", "retrain_steps=9"],
            "qat-bits {} latency_ms=2.0 allocation.latencies=ms.json {} retrain_steps=9",
        ),
    ],
)
def test_the_command_of_a_run_whose_bits_are_chosen(
    overrides: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ms.json").write_text("{}")
    config = from_hydra(compose_config(["model=resnet20", "dataset=digits", *overrides]))
    groups = "model=resnet20 dataset=digits clipping=octav gradient=mph"
    assert command(config) == text.format(groups, "weights=w.pt")


def test_chosen_bits_replace_the_bits_of_an_experiment() -> None:
    rows = cli_run._rows_of_experiment(["+experiment=table2", "policy=auto", "budget=4"], multirun=True)
    assert not any(row.startswith("bits=") for row in rows) and any(row.startswith("model=") for row in rows)
    asked = ["-m", "+experiment=table2", "+stand_in=digits", "policy=auto", "budget=4", "model=resnet20"]
    rows_of_all = cli_run._check_all([*asked, *cli_run._rows_of_experiment(asked, multirun=True)]).values()
    configs = [row.config for row in rows_of_all]
    assert sorted((config.clipping.name, config.policy) for config in configs if config.policy) == [
        ("max", "auto"),
        ("octav", "auto"),
    ]
    assert [config.limits for config in configs if config.quantization.full_precision] == [{}]


def test_impossible_limits_are_rejected_before_anything_is_written(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("ms.json").write_text('{"another": {"4x4": 1.0}}')
    asked, auto = (["weights=baseline", "run_dir=small", how] for how in ("mode=allocate", "bits=auto"))
    for words, sentence in (
        (["size_mb=0.01"], "size_mb=0.01: 0.01 is too low a limit of MB: the least possible is"),
        (["budget=4", "rules=[{match: '*', bits: 4}]"], "budget=4: rules set the bit-widths of all tensors"),
        (["budget=4", "allocation.latencies=ms.json"], "allocation.latencies: has no entry for conv1"),
    ):
        for how in (asked, [*auto, "mode=retrain"]):
            assert run(*how, *words) == 2
            assert sentence in capsys.readouterr().err
            assert not Path("small").exists() and not [*Path("runs").glob("*_fp32_*")]  # nor a baseline for the search
    assert run("bits=32", "epochs=1", "run_dir=small") == 0
    before = {path: path.read_bytes() for path in Path("small").rglob("*") if path.is_file()}
    assert run(*asked, "size_mb=0.01", "overwrite=true") == 2
    assert {path: path.read_bytes() for path in Path("small").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipe.freeze_scalars_at=2"], "freeze_scalars_at=2.0: must be above 0 and below epochs=1"),
        (["accumulate=100", "recipe.retrain.batch_size=64"], "accumulate=100: must be 1 to batch_size"),
        (["recipe.distill=full_precision", "recipe.teacher=gone.pt"], "gone.pt: no such file"),
        (["recipe.batchnorm_batches=2"], "recipe.batchnorm_batches=2: resnet20 has no BatchNorm"),
        (
            ["oscillations.measure=true", "oscillations.max_bits=2", "allocation.widths=[4,8]"],
            "oscillations.max_bits=2: allocation.widths=[4, 8] allow no weight with so few bits",
        ),
    ],
)
def test_impossible_retraining_is_rejected_before_anything_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.setattr("qat_runner.experiment.building.norms", lambda model: [])
    assert run("mode=allocate", "weights=baseline", "budget=4", "retrain_steps=10", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_failure_in_prices_that_are_only_shown_does_not_cost_the_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def price(*args: Any) -> Prices:
        if args[4] == "measured":
            raise ValueError("conv1.input: its price is not finite")
        return real_price(*args)

    monkeypatch.setattr(allocating, "price", price)
    torch.save(build_model("resnet8", 10, 8).state_dict(), "w.pt")
    words = ["model=resnet8", "allocation.widths=[4,8]", "weights=w.pt", "run_dir=chosen"]
    assert run("mode=allocate", "budget=4", *words) == 0
    text = "no measured prices are shown for comparison: pricing failed: conv1.input: its price is not finite"
    assert text in capsys.readouterr().out
    record = ALLOCATION.read(Path("chosen"))
    assert record is not None and record["beside"] == "measured"
    assert not any(tensor["beside"] for tensor in record["tensors"]) and allocated(Path("chosen"))
    assert report.main(["chosen"]) == 0


def test_notes_on_a_network_are_logged_once_for_all_its_variants() -> None:
    """Except in the logs of the variants, which are opened later."""
    log, texts = logging.getLogger("qat_runner"), (io.StringIO(), io.StringIO())
    outer, inner = map(logging.StreamHandler, texts)
    log.addHandler(outer)
    with _log_notes_once(["fc is shared"]):
        log.addHandler(inner)
        for said in ("fc is shared", "it is late"):
            log.warning(said)
    log.removeHandler(inner)
    log.warning("fc is shared")
    log.removeHandler(outer)
    assert texts[0].getvalue().splitlines() == ["fc is shared", "it is late", "fc is shared"]
    assert texts[1].getvalue().splitlines() == ["fc is shared", "it is late"]


def test_several_processes_cannot_choose_bits(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "launched", lambda: True)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert run("bits=auto", "budget=4") == 2
    assert "run qat-bits with the same keys first" in capsys.readouterr().err
