"""Tables of results: what is written can be read back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qat_runner.cli.report import OF_FOLDERS
from qat_runner.cli.report import main as report
from qat_runner.config.tasks import FACTS, TaskFacts
from qat_runner.report import methods
from qat_runner.report.entries import entries
from qat_runner.report.results import read_results, write_results
from qat_runner.report.runs import Run, find_runs
from qat_runner.runs.records import SUMMARY, score
from tests.report.test_pages import make_run


def _known(run: Run) -> Run:
    """Return a run without its location."""
    assert run.summary is not None
    message = {key: value for key, value in run.summary.items() if key not in ("run_dir", "config", "remedies")}
    return replace(run, folder=Path(), line=None, summary=message, config=replace(run.config, seed=0))  # type: ignore[arg-type]


def test_runs_come_out_again(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / "runs", f"seed={seed}", top1=60.0 + seed)
        make_run(tmp_path / "runs", f"seed={seed}", "bits=32", top1=62.0 + 2 * seed)
    make_run(tmp_path / "runs", "seed=1", "oscillations.freeze_to=0.1")
    make_run(tmp_path / "runs", "seed=3", top1=None)
    runs = find_runs(tmp_path / "runs")
    table, *configs = write_results(runs, tmp_path / "kept")
    assert len(configs) == 3 and all("_seed1_" in path.name for path in configs)
    finished = [run for run in runs if run.summary is not None]
    again = read_results(table)
    assert sorted(map(_known, again), key=repr) == sorted(map(_known, finished), key=repr)
    first = table.read_bytes()
    write_results(runs, tmp_path / "kept")
    assert table.read_bytes() == first
    places = (str(tmp_path / "runs"), str(table))
    lines = []
    for place in places:
        assert report(["table1", place, "--out", str(tmp_path / "tables")]) == 0
        lines.append((tmp_path / "tables" / "table1.csv").read_text())
    assert lines[0] == lines[1] and "61.50" in lines[0]
    gaps = {line.split(",")[2]: line.split(",")[5] for line in lines[1].splitlines() if line.startswith("resnet20,")}
    assert gaps["Full precision"] == "" and gaps["OCTAV (MPH)"] == "-3.50"
    one, other = (methods.numbers(methods.standings(entries([Path(place)])[0])).text("csv") for place in places)
    assert one == other and ",-3.5," in one
    once_more = write_results(read_results(table), tmp_path / "once more")[0]
    assert sorted(map(_known, read_results(once_more)), key=repr) == sorted(map(_known, finished), key=repr)


@pytest.mark.parametrize("metric", ["perplexity", "decibels"])
def test_figures_of_other_tasks_come_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """Those of language models and of installed tasks, which `Summary` does not list."""
    facts = TaskFacts("decibels", ("scratch",), frozenset(), 5, 64, unit="")
    monkeypatch.setattr(FACTS, "sound", lambda: [*((name, FACTS[name]) for name in FACTS.own), ("own", facts)])
    figures = {"metric": metric, metric: 21.5, "accuracy": 40.0, "count": 7, "bits": 4}
    for seed in (1, 2):
        file = make_run(tmp_path / "runs", f"seed={seed}", "bits=4") / SUMMARY.name
        kept = {key: value for key, value in json.loads(file.read_text()).items() if "top1" not in key}
        file.write_text(json.dumps(kept | figures | {f"best_{metric}": 20.0 if seed == 1 else None}))
    runs = find_runs(tmp_path / "runs")
    again = read_results(write_results(runs, tmp_path / "kept")[0])
    before, after = (
        [
            {key: value for key, value in (_known(run).summary or {}).items() if value is not None}
            for run in sorted(some, key=lambda run: run.seed)
        ]
        for some in (runs, again)
    )
    assert after == before and score(after[0]) == 21.5


def test_what_takes_no_table_of_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs")
    table = write_results(find_runs(tmp_path / "runs"), tmp_path / "kept")[0]
    for verb in OF_FOLDERS:
        assert report([verb, str(table)]) == 2
        assert capsys.readouterr().err == f"qat-report: {table}: is a file, but {verb} takes only folders of runs\n"


def test_lines_of_tables_are_told_apart_by_where_they_lie(tmp_path: Path) -> None:
    """Runs with the same seed are told apart by their tables; in one table, only later ones by their lines."""
    make_run(tmp_path / "runs", "seed=1")
    table = write_results(find_runs(tmp_path / "runs"), tmp_path / "one")[0]
    write_results(find_runs(tmp_path / "runs"), tmp_path / "other")
    found = entries([table, tmp_path / "other" / "results.csv"])[0]
    assert [run.method for run in found] == [f"octav, in {name}/results.csv" for name in ("one", "other")]
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    assert [run.variant for run in entries([table])[0]] == ["", "line 3"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "one", "seed=1")
    make_run(tmp_path / "other", "seed=2")
    out = tmp_path / "kept"
    assert report(["results", str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'results.csv'}\n" and len(read_results(out / "results.csv")) == 2
    (tmp_path / "none").mkdir()
    assert report(["results", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"qat-report: {tmp_path / 'none'}: holds no run of qat-run\n"


def test_what_is_named_twice_is_there_once_and_what_is_not_finished_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for top1, seed in ((60.0, 1), (None, 2)):
        make_run(Path("runs"), f"seed={seed}", name=f"of{seed}", top1=top1)
    (make_run(Path("runs"), name="bad") / "config.yaml").write_text("a: [")
    Path("link").symlink_to("runs")
    assert report(["results", "runs", "./runs", "link", "--out", "kept"]) == 0
    message = capsys.readouterr().err
    assert (
        message.count("bad/config.yaml: cannot be read") == 1
        and "Not finished: of2 (stale). They have no line." in message
    )
    assert [run.seed for run in read_results(Path("kept/results.csv"))] == [1]
    assert report(["ledger", "runs", "runs", "--out", "ledger"]) == 0
    assert "Not finished: of2 (stale)." in Path("ledger/ledger.md").read_text()
    assert report(["ledger", "runs", "kept/results.csv", "--out", "ledger"]) == 0
    said = "Not counted, since the same run is counted already: kept/results.csv, line 2."
    assert said in Path("ledger/ledger.md").read_text()
    capsys.readouterr()
    (tmp_path / "runs/of1/summary.json").unlink()
    assert report(["results", "runs"]) == 2
    assert "runs: holds no finished run of qat-run" in capsys.readouterr().err
