"""The tables printed at the end of a command, and the differences from full precision that all reports show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_runner.config import clipping_label, from_hydra, gradient_label, policy_label, run_name
from qat_runner.config.composing import compose_config
from qat_runner.report.runs import row_of
from qat_runner.report.tables import (
    Result,
    against_full_precision,
    differences_in_words,
    full_precision_of,
    mean_and_deviation,
    results_table,
    seeds_table,
    several_seeds,
)


def result(*overrides: str, top1: float = 50.0) -> Result:
    """Return a finished run with its config and summary."""
    config = from_hydra(compose_config(["model=resnet20", *overrides]))
    summary: dict[str, Any] = {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "mode": config.mode,
        "seed": config.seed,
        "bits": config.weight_bits,
        "clipping": clipping_label(config),
        "gradient": gradient_label(config),
        "top1": top1,
        "best_top1": top1,
        "sqnr_db": None,
        "samples_per_second": 1.0,
        "seconds": 1.0,
    }
    return Result(config, summary)


def differences(*results: Result) -> list[float | None]:
    return against_full_precision(results)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_mean_and_deviation(values: list[float]) -> None:
    mean, deviation = map(float, mean_and_deviation(values).split(" ± "))
    assert mean == pytest.approx(np.mean(values), abs=0.0051)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.0051)


def test_one_value_has_no_deviation_and_none_is_empty() -> None:
    assert mean_and_deviation([2.5], "+") == "+2.50"
    assert mean_and_deviation([-2.5], "+") == "-2.50"
    assert mean_and_deviation([]) == ""


def test_full_precision_is_that_of_the_same_run() -> None:
    """Runs with other epochs, learning rates or seeds are not used, whatever the order of the runs."""
    quantized = result("bits=4", "epochs=5", "seed=1", top1=60.0)
    others = [
        result("bits=32", *words, top1=99.0)
        for words in (["epochs=5"], ["epochs=4", "seed=1"], ["epochs=5", "seed=1", "lr=0.3"], ["seed=1"])
    ]
    same = result("bits=32", "epochs=5", "seed=1", top1=70.0)
    assert differences(*others, quantized) == [None] * 5
    assert differences(*others, same, quantized)[-1] == pytest.approx(-10)
    assert differences(quantized, same, *others) == [pytest.approx(-10), *[None] * 5]


@pytest.mark.parametrize(
    "words",
    [
        ["clipping=max", "gradient=ste"],
        ["weight_bits=3"],
        ["first_last_bits=4", "conv_granularity=tensor", "noise_batches=0", "log_excess_mse=true"],
        ["backend=eager", "clipping.eval_mode=running", "recipe.freeze_scalars_at=2"],
        ["recipe.distill=full_precision", "recipe.teacher=w.pt"],
        ["clipping=lsq"],
        ["oscillations.freeze_to=0.01", "recipe.batchnorm_batches=50", "rules=[{match: '*', bits: 8}]"],
    ],
)
def test_keys_of_quantization_do_not_count(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pt").touch()
    assert differences(result("bits=32", top1=90.0), result(*words, top1=85.0)) == [None, pytest.approx(-5)]


def test_the_table_names_policies_as_other_reports_do() -> None:
    run = result("rules=[{match: layer1.*, bits: 3}]")
    run.summary["remedies"] = ["mixed", "frozen"]  # type: ignore[index]
    lines = results_table([run, result("policy=auto", "budget=4")]).splitlines()
    assert f" octav+frozen, {policy_label(run.config)} " in lines[2] and "mixed" not in lines[2]
    assert " octav, policy auto " in lines[3] and "samples/s    time (s)" in lines[0]


def test_what_retraining_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pt").write_text("one")
    Path("other.pt").write_text("another")
    start = result("bits=32", "mode=evaluate", "weights=w.pt", top1=80.0)
    other = result("bits=32", "mode=evaluate", "weights=other.pt", top1=99.0)
    for mode in ("retrain", "ptq"):
        for seed in (0, 3):  # the start is the same for every seed
            run = result("bits=4", f"mode={mode}", "weights=w.pt", f"seed={seed}", top1=75.0)
            assert differences(start, other, run)[-1] == pytest.approx(-5)
    retrained = result("bits=4", "mode=retrain", "weights=w.pt", top1=75.0)
    longer = result("bits=32", "mode=retrain", "weights=w.pt", top1=82.0)
    assert differences(start, longer, retrained)[-1] == pytest.approx(-7)


def test_a_baseline_of_each_seed_is_a_start_of_its_own() -> None:
    names = ("mode=retrain", "weights=baseline")
    runs = [result("bits=4", *names, f"seed={seed}", top1=70.0 + seed) for seed in (0, 1)]
    evaluated = [
        result("bits=32", "mode=evaluate", "weights=baseline", f"seed={seed}", top1=80.0 + 5 * seed) for seed in (0, 1)
    ]
    assert differences(*evaluated, *runs)[2:] == [pytest.approx(-10), pytest.approx(-14)]
    trained = [result("bits=32", f"seed={seed}", top1=80.0 + 5 * seed) for seed in (0, 1)]
    assert differences(*trained, *runs)[2:] == [pytest.approx(-10), pytest.approx(-14)]


@pytest.mark.parametrize("words", [["policy=auto", "budget=4"], ["policy=auto", "size_mb=9", "retrain_steps=5"]])
@pytest.mark.parametrize("weights", ["baseline", "w.pt"])
def test_chosen_bits_have_the_full_precision_of_others(
    words: list[str], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pt").touch()
    retrain = "mode=retrain", f"weights={weights}"
    full = [result("bits=32", top1=90.0), result("bits=32", "mode=evaluate", f"weights={weights}", top1=92.0)]
    retrained = result("bits=32", *retrain, top1=93.0)
    for runs, text in (([*full, retrained], -2), (full, -1)):
        assert differences(*runs, result("bits=4", *retrain, top1=91.0))[-1] == pytest.approx(text)
        assert differences(*runs, result(*words, *retrain, top1=91.0))[-1] == pytest.approx(text)
    allocated = result(*words[1:], "mode=allocate", "batch_size=null", f"weights={weights}", top1=91.5)
    assert differences(*full, retrained, allocated)[-1] == pytest.approx(-0.5)  # it has not trained anything


@pytest.mark.parametrize("file", ["last.pt", "best.pt"])
@pytest.mark.parametrize("own_name", [True, False])
def test_a_checkpoint_of_a_run_is_a_start(
    file: str, own_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the checkpoint of the full-precision run in the same folder of runs that has the name and the content."""
    monkeypatch.chdir(tmp_path)
    trained = result("bits=32", "epochs=5", "limit_train_batches=9", top1=80.0)
    trained.summary["best_top1"] = 81.0  # type: ignore[index]
    name = "full" if own_name else run_name(trained.config)
    for place in ("runs", "elsewhere"):
        (Path(place) / name / "checkpoints").mkdir(parents=True)
        (Path(place) / name / "checkpoints" / file).write_text(place)
    here = trained._replace(place=tmp_path / "runs", folder=Path("runs") / name)
    other = result("bits=32", "epochs=6", top1=99.0)._replace(place=here.place, folder=Path("runs/other"))
    drop = pytest.approx(-5 if file == "last.pt" else -6)
    for mode in ("retrain", "ptq"):
        run = result("bits=4", f"mode={mode}", f"weights=runs/{name}/checkpoints/{file}", "seed=1", top1=75.0)
        run = run._replace(place=here.place)
        assert differences(here, other, run)[-1] == drop
        assert differences(here._replace(place=tmp_path / "elsewhere"), other, run)[-1] is None
        fewer = result("bits=32", "epochs=5", "limit_val_batches=1", top1=70.0)  # other validation data
        assert differences(here._replace(config=fewer.config), other, run)[-1] is None
    copied = result("bits=4", "mode=ptq", f"weights=elsewhere/{name}/checkpoints/{file}", top1=75.0)
    found = differences(here, other, copied._replace(place=here.place))[-1]
    assert found is None if own_name else found == drop  # the usual name says which run it is
    start = result("bits=32", "mode=evaluate", f"weights=runs/{name}/checkpoints/{file}", top1=77.0)
    assert differences(here, start._replace(place=here.place), run)[-1] == pytest.approx(-2)  # of the same weights


def test_what_a_search_measured_is_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pt").touch()
    evaluated = "bits=32", "mode=evaluate", "weights=w.pt"
    searched = result(*evaluated, top1=90.0)._replace(of_search=True)
    allocated = result("mode=allocate", "budget=4", "weights=w.pt", "batch_size=null", top1=88.0)
    retrained = result("policy=auto", "budget=4", "mode=retrain", "weights=w.pt", top1=89.0)
    assert differences(searched, allocated, retrained) == [None, -2, -1]
    assert differences(searched, result(*evaluated, top1=91.0), allocated, retrained)[2:] == [-3, -2]
    fewer = result("mode=allocate", "budget=4", "weights=w.pt", "batch_size=null", "limit_val_batches=1", top1=88.0)
    assert differences(searched, fewer) == [None, None]


def test_runs_on_other_numbers_of_processes_are_other_runs() -> None:
    def on(processes: int | None, *words: str, top1: float) -> Result:
        run = result(*words, top1=top1)
        more = {} if processes is None else {"processes": processes}
        return run._replace(summary={**run.summary, **more})

    full = [on(None, "bits=32", top1=90.0), on(2, "bits=32", top1=80.0)]
    runs = [on(1, "bits=4", top1=70.0), on(2, "bits=4", "seed=0", top1=71.0), on(2, "bits=4", "seed=1", top1=72.0)]
    assert differences(*full, *runs)[2:] == [-20, -9, None]
    assert differences(full[0], *runs)[1:] == [-20, None, None]
    rows = [line.split() for line in seeds_table([*full[:1], *runs]).splitlines()[2:]]
    assert [row[4:-1] if row[3] == "32" else row[4:10] for row in rows][1:] == [
        ["octav,", "processes=1", "mph", "1", "70.00", "-20.00"],
        ["octav,", "processes=2", "mph", "2", "71.50", "±"],
    ]


def test_rows_that_share_their_words_say_in_what_they_differ() -> None:
    runs = [result(*words) for words in ((), ("epochs=9",), ("epochs=9", "lr=0.5", "seed=1"), ("clipping=max",))]
    epochs, lr = runs[0].config.epochs, f"{runs[0].config.lr:g}"
    for lines in (results_table(runs).splitlines()[2:], seeds_table(runs).splitlines()[2:]):
        assert [line.partition("4  ")[2].partition("mph")[0].strip() for line in lines] == [
            f"octav, epochs={epochs}, lr={lr}",
            f"octav, epochs=9, lr={lr}",
            "octav, epochs=9, lr=0.5",
            "max",
        ]
    seeds = [result(f"seed={seed}", "mode=retrain", "weights=baseline") for seed in (0, 1)]
    assert all(" octav  " in line for line in results_table(seeds).splitlines()[2:])


def test_seeds_are_compared_with_one_kind_of_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They use the closest kind that all have, or else the one that most have."""
    monkeypatch.chdir(tmp_path)
    retrain = "mode=retrain", "weights=w.pt"
    Path("w.pt").touch()
    start = result("bits=32", "mode=evaluate", "weights=w.pt", top1=90.0)
    retrained = [result("bits=32", *retrain, f"seed={seed}", top1=93.0 + seed) for seed in range(3)]
    runs = [result("bits=4", *retrain, f"seed={seed}", top1=91.0) for seed in range(3)]
    assert differences(start, *retrained, *runs)[-3:] == [-2, -3, -4]
    assert differences(start, *retrained[:1], *runs)[-3:] == [1, 1, 1]
    assert differences(*retrained[:2], *runs)[-3:] == [-2, -3, None]
    alone = result("bits=8", "clipping=max", *retrain, top1=91.0)  # in the same column as the others
    assert differences(start, *retrained[:1], *runs, alone)[-4:] == [1, 1, 1, 1]
    assert differences(start, *retrained, *runs, alone)[-4:] == [-2, -3, -4, -2]
    more = result("bits=4", "clipping=max", *retrain, "seed=3", top1=91.0)
    assert differences(start, *retrained, *runs, alone, more)[-5:] == [1, 1, 1, 1, 1]
    longer = result("bits=4", *retrain, "epochs=9", top1=91.0)  # another recipe: does not affect the others
    assert differences(start, *retrained, *runs, longer)[-4:] == [-2, -3, -4, 1]
    Path("other.pt").write_text("other")
    elsewhere = result("bits=4", "mode=retrain", "weights=other.pt", top1=91.0)  # a seed that exists already
    assert differences(start, *retrained, *runs, elsewhere)[-4:] == [-2, -3, -4, None]


def test_of_the_same_in_several_places_it_is_the_one_beside_the_run() -> None:
    full = {name: result("bits=32", top1=top1)._replace(place=Path(name)) for name, top1 in (("a", 95.0), ("b", 85.0))}
    runs = {name: result(top1=80.0)._replace(place=Path(name)) for name in "abc"}
    for order in ("ab", "ba"):
        there = [full[name] for name in order]
        assert differences(*there, *runs.values())[2:] == [-15, -5, None]  # the last is undecided
    assert differences(full["a"], *runs.values())[1:] == [-15, -15, -15]
    again = full["a"]._replace(place=Path("b"))
    assert differences(full["a"], again, *runs.values())[2:] == [-15, -15, -15]
    unfinished = full["b"]._replace(summary={})
    assert full_precision_of([full["a"], unfinished, runs["b"]])[-1] == 0


def test_means_over_seeds_are_of_runs_that_differ_in_nothing_else() -> None:
    full = [result("bits=32", f"seed={seed}", top1=top1) for seed, top1 in enumerate((90.0, 92.0))]
    two = [result("bits=2", f"seed={seed}", top1=top1) for seed, top1 in enumerate((80.0, 88.0))]
    longer = [result("bits=2", "epochs=9", top1=89.0)]
    three = [result("bits=3", f"seed={seed}", top1=89.0) for seed in range(3)]  # full precision has two of these seeds
    table = seeds_table([*full, *two, *longer, *three]).splitlines()[2:]
    figures = [line.split("mph")[-1].split("none")[-1].split() for line in table]
    assert figures == [
        ["2", "91.00", "±", "1.41"],
        ["2", "84.00", "±", "5.66", "-7.00", "±", "4.24"],  # -10 and -4: paired by seed
        ["1", "89.00"],
        ["3", "89.00", "±", "0.00", "-2.00", "±", "1.41", "(2)"],
    ]
    assert several_seeds([*full, *longer]) and not several_seeds([full[0], two[0], *longer])
    assert len(results_table([*full, *two, *longer]).splitlines()) == 2 + 5
    assert not several_seeds([two[0], two[0]])  # one run in two folders
    assert seeds_table([*full, *two, two[0]]) == seeds_table([*full, *two])


def test_differences_in_words() -> None:
    full = [result("bits=32", f"seed={seed}", top1=90.0 + seed) for seed in (0, 1)]
    octav = [result("bits=2", f"seed={seed}", top1=88.0) for seed in (0, 1)]
    scaled = [result("bits=2", "clipping=max", "gradient=ste", f"seed={seed}", top1=80.0 + seed) for seed in (0, 1)]
    assert differences_in_words([*full, *octav, *scaled]) == [
        "resnet20, digits, scratch, 2 bits, in points against full precision: "
        "octav -2.50 ± 0.71, max with ste -10.00 ± 0.00"
    ]
    assert differences_in_words([*octav, *scaled]) == []  # no full precision to compare with
    assert differences_in_words([*full, *octav]) == []  # no other method
    longer = [result(bits, "epochs=9") for bits in ("bits=32", "bits=2")]
    assert differences_in_words([*full, *octav, *longer]) == []  # which octav?


@pytest.mark.parametrize(
    ("words", "row"),
    [
        ([], "octav"),
        (["gradient=pwl"], "octav_pwl"),
        (["clipping=static_percentile"], "static_percentile_99_99"),
        (["weight_bits=3"], None),
        (["clipping=max", "gradient=ste"], "max_ste"),
        (["clipping.refine=64"], None),
        (["gradient=ewgs"], "octav_ewgs"),
        (["gradient=ewgs", "gradient.options.delta=0.5"], None),
        (["rules=[{match: layer1.*, bits: 8}]"], None),
        (["oscillations.freeze_to=0.01"], None),
        (["recipe.batchnorm_batches=50"], None),
        (["bits=32"], "full_precision"),
        (["bits=32", "recipe.batchnorm_batches=50"], None),
    ],
)
def test_rows_of_the_paper_s_tables_have_nothing_else(words: list[str], row: str | None) -> None:
    mode = ["mode=retrain", "weights=w.pt"] if "clipping=static_percentile" in words else []
    assert row_of(from_hydra(compose_config(["model=resnet20", *mode, *words]))) == row
