"""Methods over seeds: what is compared with what, checked against SciPy's paired t-test."""

import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from scipy.stats import ttest_rel

from qat_runner.cli.report import main as report
from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError
from qat_runner.paper import figures
from qat_runner.report import compare_page, run_page
from qat_runner.report.entries import entries, rules_in_words
from qat_runner.report.methods import Standing, numbers, standings, table
from tests.report.test_pages import make_run, text_of

OCTAV, MAX = (60.0, 61.0, 62.5), (58.0, 58.5, 60.9)


def _runs(folder: Path) -> Path:
    for seed, (one, other) in enumerate(zip(OCTAV, MAX, strict=True)):
        make_run(folder, f"seed={seed}", top1=one)
        make_run(folder, f"seed={seed}", "clipping=max", top1=other)
        make_run(folder, f"seed={seed}", "bits=32", top1=70.0 + seed)
    make_run(folder, "clipping=max", "bits=8", top1=20.0)
    make_run(folder, "clipping=max", "bits=8", "seed=1", top1=None)
    return folder


def _by_method(found: list[Standing]) -> dict[tuple[str, str], Standing]:
    return {(each.method, each.bits.text): each for each in found}


def test_methods_are_compared_seed_by_seed(tmp_path: Path) -> None:
    found = _by_method(standings(entries([_runs(tmp_path)])[0]))
    assert list(found) == [("octav", "4"), ("max", "4"), ("max", "8"), ("full precision", "32")]
    worse = found["max", "4"]
    theirs = ttest_rel(MAX, OCTAV).confidence_interval(0.95)
    assert worse.difference.interval == pytest.approx((theirs.low, theirs.high))
    assert worse.text == "worse" and worse.reference == "octav"
    assert worse.gap.values == (58.0 - 70, 58.5 - 71, 60.9 - 72)
    assert found["octav", "4"].text == found["full precision", "32"].text == ""
    assert found["max", "8"].text == "nothing to compare with"


def test_how_many_seeds_a_difference_is_of(tmp_path: Path) -> None:
    """The number is shown if it differs from the number of seeds."""
    runs = _runs(tmp_path)
    make_run(runs, "seed=3", "clipping=max", top1=60.0)
    found = standings(entries([runs])[0])
    heads, (octav, scaled, *_) = table(found).headers, table(found).cells
    assert (octav[3], octav[5], scaled[3]) == ("3", "-9.83 ± 0.29", "4")
    assert scaled[5].endswith(" (3)") and scaled[6] == "-2.03 [-3.15, -0.91] (3)" and heads[6] == "vs octav"
    rows = [dict(zip(numbers(found).headers, cells, strict=True)) for cells in numbers(found).cells]
    assert [rows[1][key] for key in ("seeds", "difference_seeds", "vs_fp32_seeds")] == ["0 1 2 3", "0 1 2", "0 1 2"]


def test_another_reference(tmp_path: Path) -> None:
    runs = entries([_runs(tmp_path)])[0]
    found = _by_method(standings(runs, "max"))
    assert found["octav", "4"].text == "better" and found["max", "8"].reference == "max"


def _of_two_settings(folder: Path) -> Path:
    """A sweep of two methods at two bit-widths, and a single run of one method with another limit."""
    for limit, bits, seeds in ((5, 4, (0, 1)), (5, 2, (0, 1)), (1, 4, (0,))):
        for method, top1 in (("octav", 60.0), ("max", 58.0)):
            for seed in seeds if limit == 5 or method == "octav" else ():
                words = f"clipping={method}", f"bits={bits}", f"seed={seed}", f"limit_train_batches={limit}"
                make_run(folder, *words, top1=top1 + seed + limit)
    return folder


@pytest.mark.parametrize("against", [None, "octav"])
def test_a_stray_run_takes_nobody_s_reference(tmp_path: Path, against: str | None) -> None:
    found = standings(entries([_of_two_settings(tmp_path)])[0], against)
    many, one, scaled = (
        *("octav, limit_train_batches=5", "octav, limit_train_batches=1", "max, limit_train_batches=5"),
    )
    assert {(each.method, each.bits.text): (each.reference, each.differences) for each in found} == {
        (scaled, "2"): (many, {0: -2.0, 1: -2.0}),
        (scaled, "4"): (many, {0: -2.0, 1: -2.0}),
        (many, "2"): (many, {}),
        (many, "4"): (many, {}),
        (one, "4"): (many, {0: -4.0}),
    }
    assert table(found).notes[-2:] == [
        "Runs differ in more than the method, namely in limit_train_batches. Each row is compared with the reference "
        "that has the same settings.",
        f"Compared with a reference of other settings, since there is none of the same: {one}, with {many}.",
    ]


def test_each_setting_has_a_reference_of_its_own(tmp_path: Path) -> None:
    make_run(_of_two_settings(tmp_path), "clipping=max", "limit_train_batches=1", top1=50.0)
    found = standings(entries([tmp_path])[0])
    references = {each.method: each.reference for each in found}
    assert (
        references["max, limit_train_batches=1"]
        == references["octav, limit_train_batches=1"]
        == "octav, limit_train_batches=1"
    )
    rows, heads = table(found).cells, table(found).headers
    assert heads[6:] == ["vs the reference", "reference", "verdict"]
    (row,) = (row for row in rows if row[2] == "max, limit_train_batches=1")
    assert row[6:] == ["-11.00", "octav, limit_train_batches=1", "one seed"]
    named = standings(entries([tmp_path])[0], "octav, limit_train_batches=1")  # one method, by its full name
    assert {each.reference for each in named} == {"octav, limit_train_batches=1"}


def test_options_of_a_method_are_part_of_its_name(tmp_path: Path) -> None:
    for words, top1 in (
        (("clipping.iterations=1", "gradient=ste"), 40.0),
        (("gradient=ste",), 50.0),
        (("clipping.iterations=3",), 53.0),
        ((), 60.0),
    ):
        make_run(tmp_path, *words, top1=top1)
    found = standings(entries([tmp_path])[0])
    assert {each.method: (each.reference, each.differences, each.apart) for each in found} == {
        "octav": ("octav", {}, False),
        "octav(iterations=3)": ("octav", {0: -7.0}, False),
        "octav, ste": ("octav", {0: -10.0}, False),
        "octav(iterations=1), ste": ("octav", {0: -20.0}, False),
    }
    assert len(table(found).notes) == 2
    named = standings(entries([tmp_path])[0], "octav(iterations=1)")
    assert {each.reference for each in named} == {"octav(iterations=1), ste"}


def test_runs_on_other_numbers_of_processes_are_told_apart(tmp_path: Path) -> None:
    """Those that are not finished count as well; records without the number are of one process."""
    for seed, processes in ((0, None), (1, 1), (2, 4), (3, 4)):
        run = make_run(tmp_path, f"seed={seed}", top1=60.0 + seed)
        more = {} if processes is None else {"processes": processes}
        (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | more))
    run = make_run(tmp_path, "seed=4", top1=None)
    begun = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(begun | {"resumed": [begun | {"processes": 4}]}))
    runs = entries([tmp_path])[0]
    methods = {run.config.seed: run.method for run in runs}
    one, four = "octav, processes=1", "octav, processes=4"
    assert methods == {0: one, 1: one, 2: four, 3: four, 4: four}
    assert {each.method: list(each.values) for each in standings(runs)} == {one: [0, 1], four: [2, 3]}
    assert " run seed processes " in text_of(compare_page.write([tmp_path], tmp_path / "page.html"))


def test_what_a_mode_sets_itself_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("x")
    words = "mode=ptq", f"weights={tmp_path / 'x.pt'}", "clipping=octav"
    for more in ((), ("clipping.refine=0",), ("clipping=percentile", "clipping.q=99.9")):
        make_run(tmp_path / "runs", *words, *more)
    methods = {each.method for each in standings(entries([tmp_path / "runs"])[0])}
    assert methods == {"octav", "octav(refine=0)", "percentile99.9"}


def test_limits_of_chosen_bits_stand_for_bits(tmp_path: Path) -> None:
    """They are not part of a method's name, although runs with one limit lack the other limits."""
    for seed, asked in ((0, "max_drop=2"), (0, "budget=4"), (1, "size_mb=0.5")):
        run = make_run(tmp_path, "mode=allocate", "weights=baseline", asked, f"seed={seed}")
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"mean_weight_bits": 3.5, "mean_activation_bits": 3.5}))
    found = standings(entries([tmp_path])[0])
    assert {(each.method, each.bits.text) for each in found} == {
        *(("octav, policy auto", line) for line in ("max_drop=2", "4", "size_mb=0.5"))
    }


def test_scatter_is_called_so(tmp_path: Path) -> None:
    for seed, top1 in enumerate((61.0, 60.0)):
        make_run(tmp_path, f"seed={seed}", top1=60.5)
        make_run(tmp_path, f"seed={seed}", "clipping=max", top1=top1)
        make_run(tmp_path, f"seed={seed}", "clipping=mse_sweep", top1=60.5)
    found = _by_method(standings(entries([tmp_path])[0]))
    assert found["max", "4"].text == "within the seeds' scatter"
    assert found["mse_sweep", "4"].text == "the same difference for all seeds"


def test_equal_differences_of_seeds_that_differ_are_called_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"seed={seed}", top1=60.5 + seed)
        make_run(tmp_path, f"seed={seed}", "clipping=max", top1=60.0 + seed)
    found = _by_method(standings(entries([tmp_path])[0]))
    assert found["max", "4"].text == "the same difference for all seeds" and found["max", "4"].difference.mean == -0.5


def test_policies_are_named_by_a_hash_and_their_rules_listed_once(tmp_path: Path) -> None:
    """A method with a policy is compared with the reference that has the same policy."""
    sets = ("[{match: layer1.*, bits: 3}]", "[{match: layer2.*, bits: 3}]")
    for rules in sets:
        for clipping in ("octav", "max"):
            make_run(tmp_path, f"clipping={clipping}", f"rules={rules}")
    runs = entries([tmp_path])[0]
    found = {each.method: each.reference for each in standings(runs)}
    hashes = sorted({name.partition(", policy ")[2] for name in found})
    assert len(hashes) == 2 and all(re.fullmatch("[0-9a-f]{6}", word) for word in hashes)
    assert found == {f"{name}, policy {word}": f"octav, policy {word}" for name in ("octav", "max") for word in hashes}
    assert {run.kind for run in runs} == {"octav, policy", "max, policy"}
    notes = rules_in_words(runs)
    assert len(notes) == 2 and "layer1" in " ".join(notes)
    assert any(note.endswith(": `rules=[{match:'layer1.*',bits:3}]`") for note in notes)


def test_average_bits_of_a_policy_name_what_they_depend_on(tmp_path: Path) -> None:
    rules = "rules=[{match: layer1.*, bits: 3}]"

    def note(bits: int, **means: float) -> str:
        file = make_run(tmp_path, rules, f"bits={bits}") / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | means))
        (found,) = rules_in_words(entries([tmp_path])[0])
        return found

    make_run(tmp_path, "bits=32")
    one = note(4, mean_weight_bits=3.8, mean_activation_bits=3.5)
    assert " (3.80 weight bits and 3.50 activation bits on average): `rules=[" in one
    two = note(6, mean_weight_bits=5.7)
    assert " (resnet20 at 4 bits: 3.80 weight bits and 3.50 activation bits on average; resnet20 at 6 bits: " in two
    assert "6 bits: 5.70 weight bits on average): `rules=[" in two


def test_chosen_bits_stand_where_they_cost(tmp_path: Path) -> None:
    """The config of a run with chosen bits contains a bit-width that nothing uses."""
    for budget in (3, 5):
        make_run(tmp_path, "policy=auto", f"budget={budget}")
    make_run(tmp_path, "bits=3")
    found = standings(entries([tmp_path])[0])
    assert [(each.method, each.bits.mean) for each in found] == [
        *(("octav", 3), ("octav, policy auto", 3), ("octav, policy auto", 5))
    ]


def test_the_command_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = _runs(tmp_path / "runs")
    assert report(["methods", str(runs), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| -2.03 [-3.15, -0.91] | worse " in printed and "| the reference " in printed
    (unfinished,) = (run.folder.name for run in entries([runs])[0] if run.summary is None)
    assert f"Not finished: {unfinished} (stale)." in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"methods.{suffix}" for suffix in ("md", "csv", "tex", "html", "png", "svg")}
    assert report(["methods", str(runs), "--against", "lsq"]) == 2
    message = "qat-report: --against lsq: must be one of these: max; octav\n"
    assert capsys.readouterr().err == message
    text = text_of(compare_page.write([runs], tmp_path / "compare.html"))
    assert (
        "Over seeds bits method seeds" in text
    )  # one network, which the header names and "-2.03 [-3.15, -0.91] worse" in text


def test_what_is_left_out_is_named_below_the_table(tmp_path: Path) -> None:
    runs = _runs(tmp_path / "runs")
    (make_run(runs, "seed=9", name="broken") / "summary.json").write_text("{")
    unplaced = make_run(runs, "mode=allocate", "weights=baseline", "size_mb=0.5", name="old")
    assert report(["methods", str(runs), "--out", str(tmp_path / "out")]) == 0
    (line,) = (line for line in (tmp_path / "out/methods.md").read_text().splitlines() if line.startswith("Left out"))
    assert f"{runs}/broken/summary.json: cannot be read (" in line
    assert f"; {unplaced}: does not record the average bit-width" in line


def test_the_unit_of_differences_is_that_of_the_metric(tmp_path: Path) -> None:
    points, plain, other = Measure("top1"), Measure("perplexity", "", True), Measure("psnr", "dB")
    assert [measure.points for measure in (points, plain, other)] == ["points", "perplexity", "dB"]
    (one, *_) = standings(entries([_runs(tmp_path)])[0])
    assert "the same seed, in points;" in table([one]).notes[0]
    assert "the same seed, in points or perplexity;" in table([one, replace(one, measure=plain)]).notes[0]


def test_bits_that_differ_are_no_seeds(tmp_path: Path) -> None:
    """Weights at 2 and activations at 8 bits differ from the reverse, and from 5 bits for both."""
    for bits, top1 in ((("weight_bits=2", "activation_bits=8"), 60.0), (("weight_bits=8", "activation_bits=2"), 80.0)):
        make_run(tmp_path, *bits, top1=top1)
    make_run(tmp_path, "bits=5", top1=95.0)
    found = standings(entries([tmp_path])[0])
    assert {each.bits.text: list(each.values.values()) for each in found} == {"2/8": [60], "8/2": [80], "5": [95]}


def test_other_weights_of_the_same_seed_are_another_method(tmp_path: Path) -> None:
    for name, top1 in (("x", 90.0), ("y", 10.0)):
        (tmp_path / f"{name}.pt").write_text(name)
        make_run(tmp_path, "mode=retrain", f"weights={tmp_path / name}.pt", top1=top1)
    assert sorted(value for each in standings(entries([tmp_path])[0]) for value in each.values.values()) == [10, 90]


@pytest.mark.parametrize(
    ("one", "other", "methods"),
    [
        ("epochs=30", "epochs=2", ("octav, epochs=30", "max, epochs=2")),
        ("first_last_bits=4", "", ("octav, first_last_bits=4", "max, first_last_bits=8")),
        ("model.width=0.5", "noise_batches=2", ("octav, width=0.5", "max, width=1")),
        ("oscillations.freeze_to=0.01", "recipe.batchnorm_batches=5", ("octav, frozen", "max, batchnorm")),
        ("weight_range=oriented", "gradient=ste", ("octav-weights-oriented", "max, ste")),
    ],
)
def test_what_methods_differ_in_beside_the_method_is_told(
    tmp_path: Path, one: str, other: str, methods: tuple[str, str]
) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"seed={seed}", one, top1=90.0)
        make_run(tmp_path, f"seed={seed}", "clipping=max", *filter(None, [other]), top1=80.0)
    assert tuple(each.method for each in standings(entries([tmp_path])[0])) == methods


def test_methods_that_start_elsewhere_with_a_seed_tell_it(tmp_path: Path) -> None:
    prints = {}
    for name, method in (("x", "octav"), ("y", "max")):
        (tmp_path / f"{name}.pt").write_text(name)
        prints[method] = hashlib.sha256(name.encode()).hexdigest()
        make_run(tmp_path, "mode=retrain", f"weights={tmp_path / name}.pt", f"clipping={method}", top1=50.0)
    found = {each.method for each in standings(entries([tmp_path])[0])}
    assert found == {f"{method}, weights={line[:8]}…" for method, line in prints.items()}


def test_seeds_that_start_from_weights_of_their_own_are_seeds(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("x")
    digits = hashlib.sha256(b"x").hexdigest()[:8]
    for seed in (0, 1, 2):
        (tmp_path / f"{seed}.pt").write_text(str(seed))
        starts = {"octav": "baseline", "max": tmp_path / "x.pt", "lsq": tmp_path / f"{seed}.pt"}
        for method, start in starts.items():
            how = ("mode=retrain", f"weights={start}", f"clipping={method}", f"seed={seed}")
            make_run(tmp_path, *how, top1=50.0 + len(method))
    found = {each.method: each for each in standings(entries([tmp_path])[0], "octav")}
    assert {method: len(each.values) for method, each in found.items()} == dict.fromkeys(
        ["octav, weights=baseline", f"max, weights={digits}…", "lsq, weights=of each seed"], 3
    )
    assert list(found[f"max, weights={digits}…"].differences.values()) == [-2.0] * 3
    with pytest.raises(ConfigError, match="--against pact: must be one of these: lsq, weights=of each seed; max, "):
        standings(entries([tmp_path])[0], "pact")


def test_two_sets_of_starts_are_two_settings(tmp_path: Path) -> None:
    """Methods whose seeds start from other weights than those of the reference are named after them."""
    for seed in (0, 1, 2):
        for name, method, top1 in (("a", "octav", 86.0), ("b", "max", 61.0), ("a", "lsq", 85.0)):
            start = tmp_path / f"{name}{seed}.pt"
            start.write_text(start.name)
            how = ("mode=retrain", f"weights={start}", f"clipping={method}", f"seed={seed}")
            make_run(tmp_path, *how, top1=top1 + seed)
    prints = [hashlib.sha256(name).hexdigest()[:8] for name in (b"a0.pt", b"b0.pt")]
    a, b = (f"weights=of each seed ({digits}… for seed 0)" for digits in prints)
    found = {each.method: each for each in standings(entries([tmp_path])[0])}
    assert found.keys() == {f"octav, {a}", f"max, {b}", f"lsq, {a}"}
    assert {each.method for each in found.values() if each.apart} == {f"max, {b}"}


def test_full_precision_of_several_modes_is_not_averaged(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("x")
    for seed in (0, 1, 2):
        make_run(tmp_path, "bits=32", f"seed={seed}", top1=90.0 + seed)
        make_run(tmp_path, "mode=retrain", "weights=baseline", f"seed={seed}", top1=85.0 + seed)
    make_run(tmp_path, "bits=32", "mode=evaluate", f"weights={tmp_path / 'x.pt'}", top1=70.0)
    make_run(tmp_path, "mode=retrain", f"weights={tmp_path / 'x.pt'}", "clipping=max", top1=60.0)
    found = {each.method: list(each.values.values()) for each in standings(entries([tmp_path])[0])}
    assert found["full precision, scratch"] == [90.0, 91.0, 92.0] and found["full precision, evaluate"] == [70.0]
    page = text_of(compare_page.write([tmp_path], tmp_path / "compare.html"))
    assert "full precision, evaluate" in page


def test_full_precision_that_is_compared_with_is_shown(tmp_path: Path) -> None:
    """Even if the mode of the runs has a full-precision run of its own."""
    for seed in (0, 1, 2):
        make_run(tmp_path, "bits=32", f"seed={seed}", top1=90.0 + seed)
        make_run(tmp_path, "mode=retrain", "weights=baseline", f"seed={seed}", top1=93.0 + seed)
    make_run(tmp_path, "mode=retrain", "weights=baseline", "bits=32", top1=97.0)
    found = {each.method: each for each in standings(entries([tmp_path])[0])}
    assert found["octav"].gap.values == (3.0, 3.0, 3.0)
    assert list(found["full precision, scratch"].values.values()) == [90.0, 91.0, 92.0]
    assert list(found["full precision"].values.values()) == [97.0]


def test_two_starts_are_no_seeds_of_one_method(tmp_path: Path) -> None:
    """Not even if no seed occurs twice."""
    for seed in range(4):
        start = tmp_path / f"{seed // 2}.pt"
        start.write_text(str(seed // 2))
        make_run(tmp_path, "mode=retrain", f"weights={start}", f"seed={seed}", top1=50.0 + seed)
    found = standings(entries([tmp_path])[0])
    prints = [hashlib.sha256(name.encode()).hexdigest()[:8] for name in "01"]
    assert {each.method: list(each.values.values()) for each in found} == {
        f"octav, weights={prints[0]}…": [50, 51],
        f"octav, weights={prints[1]}…": [52, 53],
    }


def test_each_seed_s_own_start_is_no_matter_where_methods_differ_in_more(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"{seed}.pt").write_text(str(seed))
        for epochs in (2, 3):
            start = "mode=retrain", f"weights={tmp_path / f'{seed}.pt'}"
            make_run(tmp_path, *start, f"seed={seed}", f"epochs={epochs}", top1=50.0 + seed)
    assert {each.method: len(each.values) for each in standings(entries([tmp_path])[0])} == {
        "octav, epochs=2": 2,
        "octav, epochs=3": 2,
    }


def test_chosen_bits_of_several_seeds_are_one_width(tmp_path: Path) -> None:
    """Whatever average each seed reaches; the label is the requested limit."""
    for method, means in (("octav", (3.88, 3.92, 3.72)), ("max", (3.6, 3.7, None))):
        for seed, mean in enumerate(means):
            asked = "policy=auto", "size_mb=0.15", f"clipping={method}", f"seed={seed}"
            run = make_run(tmp_path, *asked, top1=None if mean is None else 90.0 + seed)
            if mean is not None:
                summary = json.loads((run / "summary.json").read_text())
                averaged = summary | {"mean_weight_bits": mean, "mean_activation_bits": 4.0}
                (run / "summary.json").write_text(json.dumps(averaged))
    runs = entries([tmp_path])[0]
    (width,) = {run.bits for run in runs}
    assert width is not None and width.text == "size_mb=0.15"
    assert width.mean == pytest.approx((3.88 + 3.92 + 3.72 + 3.6 + 3.7 + 5 * 4.0) / 10)
    found = _by_method(standings(runs))
    assert len(found["octav, policy auto", "size_mb=0.15"].values) == 3
    assert found["max, policy auto", "size_mb=0.15"].differences == {0: 0.0, 1: 0.0}
    assert "size_mb=0.15" in text_of(compare_page.write([tmp_path], tmp_path / "compare.html"))


def test_full_precision_of_another_folder_is_not_subtracted(tmp_path: Path) -> None:
    for place, less in (("before", 0.0), ("after", 10.0)):
        for seed in (0, 1):
            make_run(tmp_path / place, f"seed={seed}", top1=90.0 - less)
            make_run(tmp_path / place, f"seed={seed}", "bits=32", top1=95.0 - less + seed)
    found = standings(entries([tmp_path / "before", tmp_path / "after"])[0])
    assert {each.method: each.gap.values for each in found if not each.full_precision} == {
        "octav, in before": (-5.0, -6.0),
        "octav, in after": (-5.0, -6.0),
    }


def test_what_is_no_run_among_many_places_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, if the shell expanded runs/*."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs"), name="one"), make_run(Path("runs"), "clipping=max", name="other")
    (make_run(Path("runs"), name="broken") / "config.yaml").write_text("a: [")
    Path("runs/begun").mkdir()
    Path("runs/asked.txt").write_text("one\n")
    runs, left_out = entries(sorted(Path("runs").iterdir()))
    assert [run.folder.name for run in runs] == ["one", "other"]
    assert [why.split(":")[0] for why in left_out] == ["runs/asked.txt", "runs/begun", "runs/broken/config.yaml"]
    for few in (["runs/begun", "runs/one"], ["runs/one", "runs/one"]):
        with pytest.raises(ConfigError, match="needs at least two runs, found 1"):
            entries(list(map(Path, few)))
    for places, line in (
        (["runs", "gone"], "gone: no such folder"),
        (["gone"], "gone: no such folder"),
        (["runs/begun"], "runs/begun: holds no run"),
    ):
        with pytest.raises(ConfigError, match=line):
            entries(list(map(Path, places)))


def test_what_was_quantized_without_training_is_no_start_of_others(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("x")
    weights = f"weights={tmp_path / 'x.pt'}"
    make_run(tmp_path, "mode=retrain", weights, top1=90.0)
    make_run(tmp_path, "mode=retrain", weights, "clipping=max", top1=89.0)
    make_run(tmp_path, "mode=evaluate", weights, top1=10.0)
    found = standings(entries([tmp_path])[0])
    values = [(each.network.rpartition(", ")[2], each.method, list(each.values.values())) for each in found]
    assert values == [("retrain", "octav", [90]), ("retrain", "max", [89]), ("evaluate", "octav", [10])]


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a/runs", "b/runs")])
def test_the_same_runs_in_two_folders_are_no_seeds(tmp_path: Path, one: str, other: str) -> None:
    for place, top1 in ((one, 62.0), (other, 50.0)):
        make_run(tmp_path / place, top1=top1)
        make_run(tmp_path / place, "seed=1", top1=top1 - 1)
    found = standings(entries([tmp_path / one, tmp_path / other])[0])
    assert {each.method: list(each.values.values()) for each in found} == {
        f"octav, in {one}": [62, 61],
        f"octav, in {other}": [50, 49],
    }


def test_only_the_repetition_of_a_run_is_set_apart(tmp_path: Path) -> None:
    """The run under its usual name keeps the method's name; the repetition is compared with the same reference."""
    for seed in (0, 1):
        for bits in (3, 4):
            for method, top1 in (("octav", 60.0), ("max", 50.0)):
                words = f"clipping={method}", f"bits={bits}", f"seed={seed}", f"noise_batches={bits}"
                make_run(tmp_path / "a", *words, top1=top1 + bits + seed)
    make_run(tmp_path / "a", "bits=4", "noise_batches=4", name="again", top1=65.5)
    found = standings(entries([tmp_path / "a"])[0])
    assert {(each.method, each.bits.text): dict(each.values) for each in found} == {
        ("octav", "3"): {0: 63.0, 1: 64.0},
        ("octav", "4"): {0: 64.0, 1: 65.0},
        ("octav, again", "4"): {0: 65.5},
        ("max", "3"): {0: 53.0, 1: 54.0},
        ("max", "4"): {0: 54.0, 1: 55.0},
    }
    assert {each.reference for each in found} == {"octav"} and not any(each.apart for each in found)
    make_run(tmp_path / "b", "bits=4", "noise_batches=4", top1=70.0)
    several = _by_method(standings(entries([tmp_path / "a", tmp_path / "b"])[0]))
    assert {name: len(each.values) for (name, bits), each in several.items() if bits == "4"} == {
        "octav, in a": 2,
        "octav, in a, again": 1,
        "octav, in b": 1,
        "max": 2,
    }


def test_seeds_of_two_machines_are_seeds_of_one_method(tmp_path: Path) -> None:
    """Those that both machines ran are repetitions in the table of results."""
    for place, seeds in (("one", (0, 1, 2)), ("other", (2, 3))):
        for seed in seeds:
            make_run(tmp_path / place, f"seed={seed}", top1=60.0 + seed)
            make_run(tmp_path / place, f"seed={seed}", "clipping=max", top1=50.0 + seed)
    places = [str(tmp_path / place) for place in ("one", "other")]
    assert report(["results", *places, "--out", str(tmp_path)]) == 0
    found = {each.method: each for each in standings(entries([tmp_path / "results.csv"])[0])}
    assert {name: list(each.values) for name, each in found.items() if ", line " not in name} == {
        "octav": [0, 1, 2, 3],
        "max": [0, 1, 2, 3],
    }
    assert found["max"].difference.values == (-10.0,) * 4
    for what in ("table1", "figure4"):
        assert report([what, *places, "--out", str(tmp_path)]) == 0
    rows = csv.DictReader((tmp_path / "table1.csv").read_text().splitlines())
    assert [row["seeds"] for row in rows if row["network"] == "resnet20"] == ["0", "4", "0", "0", "0", "4"]
    assert sorted(list(each.values) for name, each in found.items() if ", line " in name) == [[2], [2]]


def test_keys_that_usually_go_with_bits_tell_runs_of_the_same_bits_apart(tmp_path: Path) -> None:
    for batches, top1 in ((1, 60.0), (2, 40.0)):
        make_run(tmp_path, f"noise_batches={batches}", top1=top1)
    found = standings(entries([tmp_path])[0])
    assert {each.method: list(each.values.values()) for each in found} == {
        "octav, noise_batches=1": [60],
        "octav, noise_batches=2": [40],
    }


def test_a_network_of_one_run_has_a_row_as_well(tmp_path: Path) -> None:
    make_run(tmp_path, top1=60.0)
    make_run(tmp_path, "clipping=max", top1=50.0)
    make_run(tmp_path, "model=resnet8", top1=70.0)
    found = standings(entries([tmp_path])[0])
    assert [each.values[0] for each in found] == [60, 50, 70]
    assert len({each.network for each in found}) == 2
    figure = figures.methods(found)
    assert [ax.get_title() for ax in figure.axes] == [found[0].network]  # a single run is not drawn
    figures.plt.close(figure)


def test_the_baseline_that_runs_start_from_stands_beside_them(tmp_path: Path) -> None:
    start = make_run(tmp_path, "bits=32", top1=70.0)
    make_run(tmp_path, "mode=retrain", "weights=baseline", top1=69.0)
    make_run(tmp_path, "mode=retrain", "weights=baseline", "clipping=max", top1=68.0)
    found = standings(entries([tmp_path])[0])
    assert [(each.method, each.gap.values) for each in found] == [
        *(("octav", (-1.0,)), ("max", (-2.0,)), ("full precision", ()))
    ]
    assert len({each.network for each in found}) == 1 and start.exists()


def test_what_a_search_measured_is_full_precision(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("x")
    weights, runs = f"weights={tmp_path / 'x.pt'}", tmp_path / "runs"
    search = make_run(runs, "mode=allocate", weights, "budget=4", top1=80.0)
    make_run(search / "probes", "bits=32", "mode=evaluate", weights, top1=85.0)
    make_run(runs, "policy=auto", "mode=retrain", weights, "budget=4", top1=84.0)
    found = standings(entries([runs])[0])
    assert {each.network.rpartition(" ")[2]: each.gap.values for each in found} == {"allocate": (-5,), "retrain": (-1,)}
    assert "-5.00" in text_of(compare_page.write([runs], tmp_path / "page.html"))
    assert "-5.00 points; fp32 is the network that it starts from" in text_of(run_page.write(search, tmp_path / "run"))


def test_numbers_to_compute_with(tmp_path: Path) -> None:
    report(["methods", str(_runs(tmp_path / "runs")), "--out", str(tmp_path / "out")])
    rows = {
        row["method"]: row
        for row in csv.DictReader((tmp_path / "out/methods.csv").read_text().splitlines())
        if row["bits"] != "8"
    }
    row, theirs = rows["max"], ttest_rel(MAX, OCTAV).confidence_interval(0.95)
    assert tuple(map(float, row["values"].split())) == MAX and row["seeds"] == "0 1 2"
    assert (float(row["low"]), float(row["high"])) == pytest.approx((theirs.low, theirs.high))
    assert float(row["deviation"]) == pytest.approx(stdev(MAX)) and row["verdict"] == "worse"
    assert rows["octav"]["difference"] == rows["full precision"]["reference"] == ""


def test_runs_of_one_network_or_data_set_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for model in ("resnet20", "resnet8"):
        for clipping in ("octav", "max"):
            make_run(runs, f"model={model}", f"clipping={clipping}", top1=10.0)
    for verb in ("compare", "results"):
        assert report([verb, str(runs), "--model", "resnet8", "--out", str(tmp_path / verb)]) == 0
    assert len((tmp_path / "results/results.csv").read_text().splitlines()) == 3
    assert "2 runs" in text_of(tmp_path / "compare/compare.html")
    capsys.readouterr()
    assert report(["methods", str(runs), "--model", "vgg"]) == 2
    assert "--model vgg: there are runs of resnet20, resnet8" in capsys.readouterr().err
    assert report(["ledger", str(runs), "--dataset", "mnist"]) == 2
    assert "--dataset mnist: there are runs of fake" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "--against", "max"], "--against: applies only to methods"),
        (["figure3", "--run", "there"], "--run: applies only to table6, figure1, figure2, figure5, iterations"),
        (["status", "--dataset", "digits"], "--dataset: applies only to compare, methods, "),
        (["status", "--out", "there"], "--out: status writes nothing"),
        (["figure2", "--run", "there", "--model", "resnet8"], "--model: cannot be combined with --run"),
    ],
)
def test_what_has_no_effect_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(args) == 2
    assert message in capsys.readouterr().err
