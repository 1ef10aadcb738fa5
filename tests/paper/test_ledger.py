"""The ledger: the claims fit the paper's numbers, verdicts are those of a paired t-test, and no cell is left out."""

import csv
import math
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.stats import ttest_rel

from qat_runner.cli.report import main as report
from qat_runner.cli.report import verbs
from qat_runner.config import Config, from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.errors import ConfigError
from qat_runner.paper.cells import BASELINE, cells_of, estimates
from qat_runner.paper.claims import Finding, Statement, claims, content, together
from qat_runner.paper.evidence import CHANCE, FULL_PRECISION, setups_of
from qat_runner.paper.ledger import ledger, setup_command, words_of_row
from qat_runner.paper.tables import paper
from qat_runner.report.differences import ROUNDING, Differences, Verdict
from qat_runner.report.results import read_results
from qat_runner.report.runs import Run
from tests.paper.test_tables import CELLS
from tests.report.test_pages import config_of, make_run

# claims.yaml


def test_the_paper_s_own_numbers_are_as_it_claims() -> None:
    for claim in claims():
        for statement in claim.statements:
            found = claim.published(statement)
            assert found, (claim.id, statement)
            for model, difference in found.items():
                assert statement.above < difference < statement.below, (claim.id, model, statement.text())


def test_claims_are_about_what_there_is() -> None:
    assert len({claim.id for claim in claims()}) == len(claims()) > 30
    models = [*paper()["full_precision"], "resnet20", "bert"]
    for claim in claims():
        assert (
            bool(claim.statements) == bool(claim.models) == bool(claim.mode) != bool(claim.see) or not claim.statements
        )
        assert bool(claim.found) != bool(claim.statements)
        if claim.found:
            assert claim.found.verdict in ("holds", "holds in part", "not seen", "does not hold") and claim.found.says
        if claim.see and claim.see.startswith("qat-report"):
            assert claim.see.split()[1] in verbs()
        for statement in claim.statements:
            assert {statement.of, statement.minus} <= {*paper()["labels"], FULL_PRECISION, CHANCE}
    assert {*content()["stand_ins"]} == {*paper()["full_precision"]} == {*estimates().samples_per_second} <= {*models}


# Verdicts


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=6))
def test_the_interval_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    found = Differences(tuple(round(a - b, 3) for a, b in pairs))
    if max(found.values) - min(found.values) < ROUNDING:  # for which scipy returns nan
        assert found.interval is None
        return
    expected = ttest_rel(found.values, [0.0] * len(pairs)).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "above", "below", "verdict"),
    [
        ((), 0, 9, Verdict.ALONE),
        ((5.0,), 0, 9, Verdict.ONE_SEED),
        ((5.0, 5.1, 5.2), 0, 9, Verdict.HOLDS),
        ((5.0, 5.1, 5.2), 6, 9, Verdict.FAILS),
        ((5.0, 5.1, 5.2), 0, 4, Verdict.FAILS),
        ((5.0, 5.1, 5.2), 5, 9, Verdict.OPEN),
        ((-1.0, 5.1, 9.2), 0, 20, Verdict.OPEN),
        ((5.0, 5.0), 0, float("inf"), Verdict.ALIKE),
        ((5.0, 5.1), 0, float("inf"), Verdict.HOLDS),
    ],
)
def test_verdicts(values: tuple[float, ...], above: float, below: float, verdict: Verdict) -> None:
    assert Differences(values).verdict(above, below) is verdict


def test_networks_that_collapsed_are_at_chance_for_sure() -> None:
    """Every seed is exactly at chance, 10 % of ten classes; zero variance does not make the verdict doubtful."""
    alike = Differences((0.0, 0.0, 0.0), certain=True)
    assert alike.interval == (0.0, 0.0) and alike.verdict(-math.inf, 5) is Verdict.HOLDS
    assert Differences((0.0,), certain=True).verdict(-math.inf, 5) is Verdict.ONE_SEED


def finding(number: int, *values: float) -> Finding:
    """Return a finding on a statement that holds for differences above zero."""
    statement = Statement(f"octav{number}", "max", 4, 0.0, float("inf"), None)
    return Finding(statement, setups_of(runs())[0], Differences(values))


def test_verdicts_together() -> None:
    holds, fails, one = (1.0, 1.1), (-1.0, -1.1), (1.0,)
    assert together([finding(0, *holds), finding(1, *fails), finding(2, *one)], 3) is Verdict.FAILS
    assert together([finding(0, *holds), finding(1, *holds)], 2) is Verdict.HOLDS
    assert together([finding(0, *holds)], 2) is Verdict.OPEN  # the other statement was not run
    assert together([finding(0, *holds), finding(0, *holds)], 2) is Verdict.OPEN  # nor here: one statement, two setups
    assert together([finding(0, *one), finding(1, *one)], 3) is Verdict.ONE_SEED
    assert together([finding(0, *holds), finding(1, *one)], 2) is Verdict.OPEN


# Runs


def run(row: str, bits: int | None, seed: int, top1: float, mode: str = "scratch", **other: object) -> Run:
    """Return a run of ResNet-20 on CIFAR-10 with the fields that the ledger uses."""
    overrides = [
        "dataset=cifar10",
        "dataset.image_size=16",
        f"mode={mode}",
        *(["weights=baseline"] * (mode != "scratch")),
    ]
    base = config_of(*overrides, f"+row={row}", f"bits={bits or 32}")
    config = replace(base, seed=seed, **other)  # type: ignore[arg-type]
    return Run(Path(f"{row}{seed}"), config, "resnet20", "cifar10", mode, bits or 32, row, seed, {}, {"top1": top1})  # type: ignore[typeddict-item]


def runs() -> list[Run]:
    tops = {
        ("full_precision", None): (70.0, 71.0, 72.0),
        ("max", 4): (66.0, 67.1, 68.0),
        ("octav", 4): (69.4, 70.5, 71.6),
    }
    return [run(*cell, seed, top1) for cell, values in tops.items() for seed, top1 in enumerate(values)]


def test_claims_are_judged_by_runs_of_one_setup() -> None:
    other = [run("octav", 4, seed, 10.0, lr=0.5) for seed in range(3)]  # another recipe, without full precision
    setups = setups_of([*runs(), *other])
    assert [len(setup.results) for setup in setups] == [9, 3]
    by_id = {claim.id: claim for claim in claims()}
    found = by_id["octav-4-bits"].findings(setups)
    assert [finding.differences.values for finding in found] == [pytest.approx((-0.6, -0.5, -0.4)), ()]
    assert [finding.verdict for finding in found] == [Verdict.HOLDS, Verdict.ALONE]
    assert by_id["octav-4-bits"].verdict(found) == "holds in 1 of 2 setups, cannot be told in 1"
    found = by_id["max-4-bits"].findings(setups[:1])
    assert (
        found[1].differences.values == pytest.approx((3.4, 3.4, 3.6)) and by_id["max-4-bits"].verdict(found) == "holds"
    )
    assert by_id["ste-unstable"].verdict(by_id["ste-unstable"].findings(setups)) == "not run"
    assert by_id["any-start"].verdict([]) == "holds"  # the project's own finding


@pytest.mark.parametrize(
    ("octav", "scaled", "seeds"),
    [("AAA", "AAA", 3), ("AAA", "BBB", 0), ("ABC", "ABC", 3), ("ABC", "ABD", 2), ("ABC", "BCA", 0)],
)
def test_only_runs_of_one_start_are_compared(octav: str, scaled: str, seeds: int) -> None:
    prints = {"fingerprints": {letter: letter for letter in "ABCD"}}
    found = [
        run(row, 4, seed, top1 + seed, "retrain", weights=weights, **prints)
        for row, starts, top1 in (("octav", octav, 90.0), ("max", scaled, 80.5))
        for seed, weights in enumerate(starts)
    ]
    (setup,) = setups_of(found)
    assert setup.differences("octav", "max", 4).values == (9.5,) * seeds


def test_two_starts_are_no_seeds_of_one_row() -> None:
    starts = [
        run("octav", 4, seed, 90.0, "retrain", weights=name, fingerprints={name: name})
        for seed, name in enumerate("AAB")
    ]
    (setup,) = setups_of(starts)
    with pytest.raises(ConfigError, match="octav0 and octav2 would share a cell of the table, but differ in weights"):
        setup.cell("octav", 4)


def test_a_run_that_two_machines_repeated_counts_once() -> None:
    tops = {("full_precision", None): 75.0, ("max", 4): 60.0, ("octav", 4): 74.5}
    again = [
        replace(run(*cell, seed, top1 - seed), folder=Path("other") / f"{cell[0]}{seed}")
        for cell, top1 in tops.items()
        for seed in (2, 3)
    ]
    del again[2]  # max-scaling with seed 2 was run on one machine
    page, _ = ledger([*runs(), *again])
    (setup,) = setups_of([*runs(), *again])
    assert {seed: some.value for seed, some in setup.cell("octav", 4).items()} == {0: 69.4, 1: 70.5, 2: 71.6, 3: 71.5}
    assert setup.differences("octav", FULL_PRECISION, 4).values == pytest.approx((-0.6, -0.5, -0.4, -0.5))
    said = "Not counted, since the same run is counted already: other/full_precision2, other/octav2."
    assert said in page.tables[1].notes


def test_a_repeated_run_is_compared_with_full_precision_beside_it() -> None:
    beside = [
        replace(run(*cell, 0, top1), folder=Path("other") / cell[0])
        for cell, top1 in {("full_precision", None): 60.0, ("octav", 4): 58.0}.items()
    ]
    (setup,) = setups_of([run("full_precision", None, 0, 70.0), *beside])
    assert setup.differences("octav", FULL_PRECISION, 4).values == (-2.0,)


def test_what_no_row_says_makes_another_setup() -> None:
    other = [run("octav", 4, seed, 60.0, first_last_bits=4) for seed in range(3)]
    setups = setups_of([*runs(), *other])
    assert sorted(len(setup.results) for setup in setups) == [6, 9]  # full precision belongs to both


def test_other_numbers_of_processes_make_another_setup() -> None:
    again = [replace(one, summary=(one.summary or {}) | {"processes": 4}) for one in runs()]  # type: ignore[arg-type]
    setups = setups_of([*runs(), *again])
    assert len(setups) == 2 and [len(setup.results) for setup in setups] == [len(runs())] * 2
    for setup in setups:  # each is compared with its own full precision
        assert setup.differences("octav", FULL_PRECISION, 4).values == pytest.approx((-0.6, -0.5, -0.4))
    page = ledger([*runs(), *again])[0].text("markdown")
    assert page.count(" on 4 processes |") == 1 and "Not counted, since the same run" not in page


def test_setups_that_disagree_are_counted() -> None:
    worse = [
        run(*cell, seed, top1 + 0.1 * seed * (cell[1] or 0), lr=0.5)
        for cell, top1 in ((("full_precision", None), 70.0), (("octav", 4), 60.0))
        for seed in range(2)
    ]
    one = [run(row, bits, 0, 70.0, lr=0.3) for row, bits in (("full_precision", None), ("octav", 4))]
    (claim,) = [claim for claim in claims() if claim.id == "octav-4-bits"]

    def verdict(*some: Run) -> str:
        return claim.verdict(claim.findings(setups_of(some)))

    assert verdict(*runs(), *worse) == "holds in 1 of 2 setups, does not hold in 1"
    assert verdict(*runs(), *one) == "holds in 1 of 2 setups, cannot be told in 1"
    assert verdict(*worse, *one) == "does not hold in 1 of 2 setups, cannot be told in 1"
    assert verdict(*runs(), *worse, *one) == "holds in 1 of 3 setups, does not hold in 1, cannot be told in 1"
    assert verdict(*one) == "cannot be told: one seed"


def test_page_and_csv_count_the_setups_that_decide_a_claim() -> None:
    one = [run(row, bits, 0, 70.0, lr=0.3) for row, bits in (("full_precision", None), ("octav", 4))]
    page, lines = ledger([*runs(), *one])
    verdict = "holds in 1 of 2 setups, cannot be told in 1"
    (overview, *_) = page.tables
    assert [cells[1] for cells in overview.cells if cells[0] == "octav-4-bits"] == [verdict]
    assert f"; 2 {verdict}; " in page.lead[-1] and "it counts the setups with each" in " ".join(page.lead)
    found = [dict(zip(lines.headers, line, strict=True)) for line in lines.cells]
    assert {line["verdict_of_claim"] for line in found if line["entry"] == "octav-4-bits"} == {verdict}


def lengthy(mode: str, top1: float, start: str = "A", **other: object) -> list[Run]:
    """Return three seeds of OCTAV at 4 bits for the claim that longer retraining is better."""
    weights: dict[str, Any] = {} if mode == "scratch" else {"weights": start, "fingerprints": {start: start}}
    step = 0.1 if mode == "long_retrain" else 0.2
    return [run("octav", 4, seed, top1 + step * seed, mode, **weights, **other) for seed in range(3)]


SHORT, SCRATCH = {"mode": "retrain", "top1": 86}, {"mode": "scratch", "top1": 85}


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ([SHORT, SCRATCH], "holds"),
        ([SHORT, SCRATCH | {"top1": 95}], "does not hold"),
        ([SHORT | {"epochs": 2}, SCRATCH], "holds"),  # the mode prescribes the epochs
        ([SHORT, SCRATCH, SCRATCH | {"top1": 95, "epochs": 200}], "holds"),
        ([SHORT, SCRATCH, SCRATCH | {"top1": 95, "limit_train_batches": 7}], "holds"),
        ([SHORT, SCRATCH, SHORT | {"top1": 95, "batch_size": 64}], "holds"),
        ([SHORT, SCRATCH, SHORT | {"top1": 95, "amp": "bf16"}], "holds"),
        ([SHORT, SCRATCH, SHORT | {"top1": 95, "epochs": 2, "start": "B"}], "holds"),
        ([SHORT, SCRATCH | {"top1": 95, "epochs": 200}], "cannot be told"),
        ([SHORT | {"start": "B"}], "cannot be told: nothing to compare with"),
    ],
)
def test_runs_of_two_modes_agree_in_what_these_do_not_prescribe(others: list[dict[str, Any]], found: str) -> None:
    (claim,) = [claim for claim in claims() if claim.id == "longer-is-better"]
    setups = setups_of([*lengthy("long_retrain", 90), *(run for other in others for run in lengthy(**other))])
    assert claim.verdict(claim.findings(setups)) == found


def test_the_setup_of_the_other_mode_is_named() -> None:
    page, lines = ledger([*lengthy("long_retrain", 90), *lengthy("retrain", 86), *lengthy("scratch", 85)])
    texts = [cells[1] for cells in page.tables[2].cells if cells[0] == "longer-is-better"]
    names = [f"OCTAV (MPH) minus OCTAV (MPH) ({where}), 4 bits: above 0" for where in ("retrain, S2", "scratch, S3")]
    assert texts == names
    found = [dict(zip(lines.headers, line, strict=True)) for line in lines.cells]
    some = [(line["minus"], line["minus_setup"]) for line in found if line["entry"] == "longer-is-better"]
    assert some == [("octav retrain", "S2"), ("octav scratch", "S3")]


# Cells


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_is_there_with_what_it_would_take(name: str) -> None:
    found = cells_of([])[name]
    assert {(cell.model, cell.row, cell.bits): cell.published for cell in found} == CELLS[name]
    for cell in found:
        assert cell.verdict == Verdict.NOT_RUN
        assert (cell.gpu_hours == 0) == (cell.row == "pretrained")


def test_full_precision_is_a_baseline_only_where_it_was_run() -> None:
    found = [cell for cell in cells_of(setups_of(runs()))["table1"] if cell.bits is None]
    assert [cell.verdict for cell in found] == [BASELINE]
    found = [cell for cell in cells_of(setups_of(runs()[3:]))["table1"] if cell.bits is None]
    assert [cell.verdict for cell in found] == [Verdict.NOT_RUN]


def test_hours_are_the_papers_epochs() -> None:
    hours = {(cell.table, cell.model, cell.row): cell.gpu_hours for some in cells_of([]).values() for cell in some}
    full = 150 * 1281167 / 1200 / 3600
    assert hours["table1", "resnet50", "full_precision"] == pytest.approx(full)
    assert hours["table1", "resnet50", "octav"] == pytest.approx(1.3 * full)
    assert hours["table3", "resnet50", "octav"] == pytest.approx(0.13 * full)
    assert hours["table4", "resnet101", "octav"] / hours["table2", "resnet101", "octav"] == pytest.approx(150 / 80)


def test_a_cell_holds_within_a_point_of_the_published_one() -> None:
    (cell,) = [c for c in cells_of(setups_of(runs()))["table1"] if c.row == "octav"]
    assert cell.published_gap == pytest.approx(-0.92) and cell.ends == pytest.approx((-1.92, 0.08))
    assert (str(cell.gap), cell.verdict) == ("-0.50 [-0.75, -0.25]", "holds")
    (cell,) = [c for c in cells_of(setups_of(runs()))["table1"] if c.row == "max"]
    assert cell.verdict == "holds"  # -3.97 beside -3.40
    _, lines = ledger([*runs(), run("max", 4, 3, 68.0)])
    (line,) = [
        dict(zip(lines.headers, line, strict=True)) for line in lines.cells if line[1] == "resnet50, max, 4 bits"
    ][:1]
    assert (line["seeds"], line["difference_seeds"], line["difference"]) == ("4", "3", "-3.97")
    (cell,) = [c for c in cells_of(setups_of(runs()[3:]))["table1"] if c.row == "max"]
    assert cell.verdict == "cannot be told: nothing to compare with"


@pytest.mark.slow
def test_the_commands_of_cells_give_them() -> None:
    for cell in (cell for some in cells_of([]).values() for cell in some):
        config = from_hydra(compose_config(shlex.split(cell.command)[1:]))
        assert config.model.name == cell.model and config.weight_bits == config.activation_bits == (cell.bits or 32)
        assert config.mode == ("evaluate" if cell.row == "pretrained" else paper()[cell.table]["mode"])
        assert config.amp == "none"  # as the page says of the hours


def test_the_command_of_a_setup_and_the_words_of_a_row_give_a_run() -> None:
    (setup,) = setups_of(runs())
    base = setup_command(setup)
    assert base is not None and "bits" not in base
    words = words_of_row(setup, "octav", 4)
    assert words == "+row=octav bits=4 seed=0,1,2"
    words = words.replace("0,1,2", "2")
    config = from_hydra(compose_config([*shlex.split(base)[1:], *words.split()]))
    assert (config.weight_bits, config.clipping.name, config.seed, config.dataset.image_size) == (4, "octav", 2, 16)


@pytest.mark.parametrize(
    ("paths", "rows", "names"),
    [
        (["/a/w0.pt", "/a/w1.pt"], ["octav", "max"], ["w0.pt", "w1.pt"]),  # each seed has its own
        (["/a/w.pt", "/b/w.pt"], ["octav", "max"], ["/a/w.pt", "/b/w.pt"]),  # of the same name
        (["/a/w 0.pt", "baseline"], ["octav", "max"], ["w 0.pt", "baseline"]),
    ],
)
def test_the_words_of_a_row_name_weights_that_not_all_runs_share(
    paths: list[str], rows: list[str], names: list[str]
) -> None:
    some = [
        run(row, 4, seed, 80.0, "retrain", weights=path, fingerprints={path: path} if path != "baseline" else {})
        for row in rows
        for seed, path in enumerate(paths)
    ]
    (setup,) = setups_of(some)
    base = setup_command(setup)
    assert base is not None and "weights" not in base
    for each, row in zip(some, [row for row in rows for _ in paths], strict=True):
        words = words_of_row(setup, row, 4).split("; ")[each.seed]
        config = from_hydra(compose_config([*shlex.split(base)[1:], *shlex.split(words)]))
        assert (config.seed, config.weights, config.mode) == (each.seed, names[each.seed], "retrain")
    page, _ = ledger(some)
    assert "The runs of S1 start from several weights" in " ".join(page.tables[1].notes)


def test_the_words_of_a_row_name_its_own_weights() -> None:
    some = [
        run(row, 4, seed, 80.0, "retrain", weights=path, fingerprints={path: path})
        for row, path in (("octav", "/a/w0.pt"), ("max", "/a/w1.pt"))
        for seed in range(2)
    ]
    (setup,) = setups_of(some)
    words = [words_of_row(setup, row, 4) for row in ("octav", "max")]
    assert words == [
        f"+row={row} bits=4 seed=0,1 weights={name}" for row, name in (("octav", "w0.pt"), ("max", "w1.pt"))
    ]


# The command


def _table_of_results(folder: Path, tops: dict[tuple[str, int], float]) -> Path:
    """Write a CSV file of runs of several clipping methods, with a config of one seed each."""
    (folder / "configs").mkdir(parents=True)
    rows = []
    for (clipping, seed), top1 in tops.items():
        config: Config = config_of(f"clipping={clipping}", "bits=4") if clipping != "none" else config_of("bits=32")
        (folder / "configs" / f"{clipping}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        sentence = {"model": "resnet20", "dataset": "fake", "mode": "scratch", "clipping": clipping, "seed": seed}
        bits = 32 if clipping == "none" else 4
        sentence |= {"gradient": "none" if clipping == "none" else "mph", "weight_bits": bits, "activation_bits": bits}
        rows.append(sentence | {"epochs": 2, "seconds": 1.5, "sqnr_db": "", "top1": top1, "distilled": "", "loss": ""})
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "results.csv"


def test_the_ledger_of_a_table_of_results_and_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tops = {("none", 0): 60.0, ("none", 1): 61.0, ("octav", 0): 59.5, ("octav", 1): 60.52}
    table = _table_of_results(tmp_path, tops)
    make_run(tmp_path / "runs", "clipping=max", "lr=0.5")  # another recipe
    assert report(["ledger", str(table), str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    sentence = capsys.readouterr().out.splitlines()
    own = sum(claim.found is not None for claim in claims())
    assert sentence[0].startswith(f"{len(claims())} claims. {len(claims()) - own} are judged by these runs: ")
    assert f" {own} were examined by the project itself, independently of these runs: 3 holds" in sentence[0]
    assert sentence[1:] == [str(tmp_path / "out" / f"ledger.{kind}") for kind in ("md", "html", "csv")]
    page = (tmp_path / "out" / "ledger.md").read_text()
    for said in ("paired t-test", "GPU hours are an estimate", "needs `amp=bf16` in the commands"):
        assert said in page
    with open(tmp_path / "out" / "ledger.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    (line,) = [line for line in lines if line["entry"] == "octav-4-bits"]
    assert (line["verdict"], line["difference"], line["words"]) == ("holds", "-0.49", "+row=octav bits=4 seed=0,1")
    (line,) = [line for line in lines if (line["source"], line["entry"]) == ("table2", "resnet18, max, 4 bits")]
    assert line["verdict"] == "cannot be told: nothing to compare with" and line["values"] == "60.00"
    assert Counter(line["source"] for line in lines)["table5"] == len(CELLS["table5"])
    html = (tmp_path / "out" / "ledger.html").read_text()
    assert html.count("<h2>") == page.count("\n## ") and "<code>qat-report iterations</code>" in html


def test_runs_without_a_line_are_named(tmp_path: Path) -> None:
    table = _table_of_results(tmp_path, {("octav", 0): 59.5, ("max", 0): 59.5})
    (tmp_path / "configs" / "max.yaml").unlink()
    for seed in range(2):
        make_run(tmp_path / "runs", "weight_bits=4", "activation_bits=8", f"seed={seed}")
    damaged = make_run(tmp_path / "runs", "clipping=max", "bits=4")
    (damaged / "config.yaml").write_text("bits: [")
    assert report(["ledger", str(table), str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "ledger.md").read_text()
    said = "2 finished runs are no row of a table, and at most full precision for others: "
    assert f"{said}resnet20_fake_scratch_w4a8_octav_mph (2)." in page
    line = f"{table}: line 3: 0 configs of {tmp_path / 'configs'} match"
    assert f"Left out: {line}; {damaged / 'config.yaml'}: cannot be read (" in page


def test_a_line_without_a_config_is_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = _table_of_results(tmp_path, {("octav", 0): 59.5, ("max", 0): 59.5})
    (tmp_path / "configs" / "max.yaml").unlink()
    assert [found.row for found in read_results(table)] == ["octav"]
    assert "results.csv: line 3: 0 configs of" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,seed\nresnet20,0\n", "results.csv: cannot be read (line 2, "),
        ("a,a\n1,2\n", "results.csv: cannot be read (line 2, its cells do not match the columns)"),
        ("", "results.csv: holds no run of qat-run"),
        (None, "results.csv: no such folder of runs"),
    ],
)
def test_bad_tables_are_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    assert report(["ledger", str(tmp_path / "results.csv")]) == 2
    sentence = capsys.readouterr().err
    assert message in sentence and sentence.count("\n") == 1


def test_the_ledger_of_nothing_says_so() -> None:
    page, _ = ledger([])
    assert "No finished run is a row of a table." in page.text("markdown")
    judged, own, of_cells = (part.partition(": ")[2] for part in page.lead[-1].split(". ")[1:])
    assert judged == f"{sum(claim.found is None for claim in claims())} not run" and "not run" not in own
    assert of_cells == f"{sum(map(len, CELLS.values()))} not run."
