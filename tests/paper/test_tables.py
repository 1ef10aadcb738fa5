"""The paper's tables: every published cell appears beside our result, in every format."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from qat_runner.config import Mode, run_name
from qat_runner.errors import ConfigError
from qat_runner.paper import table6, tables
from qat_runner.paper.figures import figure4
from qat_runner.paper.tables import TableOfRuns, make_table, paper, published
from qat_runner.paper.tensor_figures import three_of
from qat_runner.report.runs import Run
from tests.report.test_pages import config_of

VISION = ("resnet50", "resnet18", "resnet101", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")

# A second transcription of the paper, in its own layout, which is not that of paper.yaml.
TABLE1 = {"Full precision": 76.07, "Max-scaled": 72.67, "STE": 67.75, "PWL": 74.31, "MAD": 74.81, "MPH": 75.15}
TABLE2 = """
76.07 75.15 72.67 76.07 76.01 76.24 76.12
70.12 69.17 65.65 69.78 69.52 70.07 70.19
77.28 76.48 72.53 77.30 77.04 77.31 77.15
71.71 70.88 69.17 71.64 71.79 71.71 71.77
65.99 54.68 0.39 65.02 60.17 65.98 65.14
72.97 65.86 1.25 72.12 69.38 72.89 72.78
"""
TABLES_3_AND_4 = """
75.38 71.44 75.84 75.85 75.66 75.51 75.29 76.21 76.46
69.16 65.53 69.18 69.28 69.04 69.08 68.93 69.90 70.13
76.10 70.88 76.96 77.01 76.79 76.99 76.34 76.84 77.48
69.32 66.94 0.66 0.93 1.72 2.14 2.76 71.23 1.21
53.52 0.10 0.43 0.58 0.65 0.10 1.46 58.93 0.80
64.97 39.46 0.39 0.30 0.34 0.71 0.57 69.21 0.60
"""
STRATEGIES = (
    *("octav", "max", "static_octav", "static_mse_sweep"),
    *("static_percentile_99_9", "static_percentile_99_99", "static_percentile_99_999"),
)
TABLE5 = """
87.09 89.77 90.51 90.81 90.78 84.51 86.30 87.43 88.28 88.34
6.92 80.06 87.71 90.04 90.48 11.51 78.97 85.17 87.46 88.01
87.08 89.54 90.60 90.79 90.61 83.60 85.82 87.14 87.67 88.02
85.54 89.77 90.39 90.80 90.55 81.82 84.16 87.14 87.68 87.97
86.98 89.79 89.99 90.07 90.11 81.06 85.78 86.73 86.84 87.34
6.90 87.63 90.38 90.79 90.33 67.90 83.20 86.78 87.60 87.94
4.56 5.66 89.76 90.44 90.83 26.85 82.15 86.27 87.51 88.08
"""


def numbers(text: str) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in text.strip().splitlines()]


def cells_of_paper() -> dict[str, dict[tuple[str, str, int | None], float]]:
    """Table -> (network, row, bits) -> number."""
    cells: dict[str, dict[tuple[str, str, int | None], float]] = {f"table{n}": {} for n in range(1, 6)}
    rows = ("full_precision", "max", "octav_ste", "octav_pwl", "octav_mad", "octav")
    for row, value in zip(rows, TABLE1.values(), strict=True):
        cells["table1"]["resnet50", row, None if row == "full_precision" else 4] = value
    for model, (full, *line) in zip(VISION, numbers(TABLE2), strict=True):
        places = [(row, bits) for bits in (4, 6, 8) for row in ("octav", "max")]
        cells["table2"] |= {(model, row, bits): value for (row, bits), value in zip(places, line, strict=True)}
        cells["table2"][model, "full_precision", None] = full
        cells["table3"][model, "pretrained", None] = cells["table4"][model, "pretrained", None] = full
    for model, line in zip(VISION, numbers(TABLES_3_AND_4), strict=True):
        cells["table3"] |= {(model, row, 4): value for row, value in zip(STRATEGIES, line[:7], strict=True)}
        cells["table4"] |= {
            (model, row, 4): value for row, value in zip(("octav", "static_octav"), line[7:], strict=True)
        }
    for row, line in zip(STRATEGIES, numbers(TABLE5), strict=True):
        places = [(model, bits) for model in ("bert_large", "bert_base") for bits in range(4, 9)]
        cells["table5"] |= {(model, row, bits): value for (model, bits), value in zip(places, line, strict=True)}
    cells["table5"] |= {("bert_large", "full_precision", None): 91.00, ("bert_base", "full_precision", None): 88.24}
    return cells


CELLS = cells_of_paper()
FULL = {**{model: line[0] for model, line in zip(VISION, numbers(TABLE2), strict=True)}, "bert_large": 91.00}
FULL["bert_base"] = 88.24


def _run(folder: Path, model: str, row: str, bits: int | None, value: float, **other: Any) -> Run:
    mode = {"full_precision": "scratch", "pretrained": "evaluate"}.get(row, other.pop("mode", "scratch"))
    other.pop("mode", None)
    seed, dataset = other.pop("seed", 0), other.pop("dataset", "imagenet")
    metric = "f1" if dataset == "squad" else "top1"
    name = f"{model}-{row}-{bits}-{seed}"
    weights = None if mode in ("scratch", "finetune") else other.pop("weights", "w.pt")
    config = config_of(f"bits={bits or 32}", f"seed={seed}")
    stage = "scratch" if mode == "finetune" else mode  # image networks have no stage finetune
    changes = {"mode": Mode(stage), "weights": weights, "fingerprints": {weights: weights} if weights else {}, **other}
    config = replace(config, model=replace(config.model, name=model), **changes)
    return Run(folder / name, config, model, dataset, mode, bits or 32, row, seed, {"row": row}, {metric: value})


@pytest.mark.parametrize("name", CELLS)
def test_every_published_cell(name: str, tmp_path: Path) -> None:
    """No cell is missing, wrong or invented, with or without runs."""
    found = {
        (model, row, bits): value
        for model in FULL
        for row in paper()[name]["rows"]
        for bits in ([None] if row in ("full_precision", "pretrained") else paper()[name]["bits"])
        if (value := published(name, model, row, bits)) is not None
    }
    assert found == CELLS[name]
    table = make_table(name, [], "squad" if name == "table5" else "imagenet")
    labels = {label: row for row, label in paper()["labels"].items()}
    shown = {(row.model, labels[row.label], row.bits): row.published for row in table.rows}
    assert shown == CELLS[name]


@pytest.mark.parametrize("name", CELLS)
def test_the_difference_of_differences(name: str, tmp_path: Path) -> None:
    """Our drop from our full precision minus the paper's drop from its own."""
    dataset, mode = ("squad", "finetune") if name == "table5" else ("imagenet", paper()[name]["mode"])
    ours = {key: 50.0 - number for number, key in enumerate(CELLS[name])}
    runs = [_run(tmp_path, *key, value, mode=mode, dataset=dataset) for key, value in ours.items()]
    labels = {label: row for row, label in paper()["labels"].items()}
    for row in make_table(name, runs, dataset).rows:
        key = row.model, labels[row.label], row.bits
        if row.bits is None:
            assert (row.gap, row.published_gap, row.difference) == (None, None, None)
            continue
        start = next(ours[k] for k in ours if k[0] == row.model and k[2] is None)
        assert row.gap == pytest.approx(ours[key] - start)
        assert row.published_gap == pytest.approx(CELLS[name][key] - FULL[row.model])
        assert row.difference == pytest.approx((ours[key] - start) - (CELLS[name][key] - FULL[row.model]))


class _Cells(HTMLParser):
    """The cells of the only table of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def _read(text: str, layout: str) -> list[list[str]]:
    """Read a table back from its text, headers first."""
    if layout == "csv":
        return list(csv.reader(text.splitlines()))
    if layout == "markdown":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    if layout == "latex":
        lines = [line.removesuffix("\\\\") for line in text.splitlines() if " & " in line]
        return [[cell.strip().replace("\\", "") for cell in line.split("&")] for line in lines]
    parser = _Cells()
    parser.feed(text[text.index("<table>") : text.index("</table>")])
    return parser.rows


@pytest.mark.parametrize("layout", ["markdown", "csv", "latex", "html"])
@pytest.mark.parametrize("name", CELLS)
def test_the_published_columns_in_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    dataset, model = ("squad", "bert_base") if name == "table5" else ("imagenet", "resnet50")
    full = "pretrained" if name in ("table3", "table4") else "full_precision"
    mode = paper()[name]["mode"]
    seeds = (0,) if full == "pretrained" else (0, 1, 2)  # paired by seed: the third has no counterpart
    runs = [_run(tmp_path, model, full, None, 70.0 + 3 * (s == 2), dataset=dataset, mode=mode, seed=s) for s in seeds]
    runs += [_run(tmp_path, model, "octav", 4, 68.5 + s, dataset=dataset, mode=mode, seed=s) for s in (0, 1)]
    heads, *rows = _read(make_table(name, runs, dataset).text(layout), layout)
    assert heads[-3:] == ["published %", "published against full precision", "difference of the two"]
    assert sorted(float(row[6]) for row in rows) == sorted(CELLS[name].values())
    (octav,) = [row for row in rows if row[:3] == [model, "4", "OCTAV (MPH)"]]
    value = CELLS[name][model, "octav", 4]
    drop = value - FULL[model]
    assert octav[3:5] == [octav[3], "2"] and octav[3].startswith("69.00 ")
    assert octav[5:] == ["-1.00", f"{value:.2f}", f"{drop:+.2f}", f"{-1.0 - drop:+.2f}"]
    others = [row for row in rows if row[0] != model]
    assert all(row[3:6] == ["missing", "0", ""] and row[-1] == "" for row in others)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "resnet50", "max", 4, 70.0)]
    text = make_table("table2", runs, "imagenet").text("markdown")
    assert "Missing: resnet50, Full precision; resnet50, Max-scaled, 6 bits; " in text
    assert "No results for resnet18, resnet101, mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large." in text
    assert "Published numbers: Sakr et al., ICML 2022, on ImageNet." in text
    with pytest.raises(ConfigError, match="--model resnet5: table2 has resnet50, resnet18, "):
        make_table("table2", runs, "imagenet", "resnet5")


def test_rows_of_other_settings_are_told_and_full_precision_is_that_of_the_same(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path, "resnet50", row, bits, value, seed=seed, epochs=30)
        for seed in (0, 1)
        for row, bits, value in (("full_precision", None, 97.0 + seed), ("octav", 4, 95.0))
    ]
    runs += [_run(tmp_path, "resnet50", "max", 4, 70.0, epochs=2, first_last_bits=4)]
    table = make_table("table1", runs[2:], "imagenet", "resnet50")
    columns = table.columns
    assert columns["against full precision"] == ["", "", "", "", "", "-3.00"]
    assert table.notes()[-1] == (
        "Rows with other settings than resnet50, Max-scaled, 4 bits: Full precision (epochs); "
        "OCTAV (MPH), 4 bits (first_last_bits, epochs)."
    )


def test_baselines_of_other_runs_are_left_out_of_a_cell(tmp_path: Path) -> None:
    """For example that of bits=auto, which ignores the epochs of the run. Without a quantized run, the first counts."""
    runs = (_run(tmp_path / f"{n}", "resnet50", "full_precision", None, 96.0 + n, epochs=n) for n in (1, 2))
    full = [replace(run, setting={"epochs": run.config.epochs}) for run in runs]
    octav = _run(tmp_path, "resnet50", "octav", 4, 95.0, epochs=2)
    table = make_table("table1", [*full, octav], "imagenet", "resnet50")
    assert table.rows[0].values == (98.0,) and table.rows[-1].gaps == (-3.0,)
    assert table.left_out == [f"{full[0].folder} (epochs)"]
    sentence = "Left out, since the runs of a row may differ only in their seed: "
    assert table.notes()[-1] == f"{sentence}{full[0].folder} (epochs)."
    assert make_table("table1", full, "imagenet", "resnet50").rows[0].values == (97.0,)


def _of_epochs(folder: Path, row: str, seed: int, epochs: int, **other: Any) -> Run:
    bits = None if row == "full_precision" else 4
    run = _run(folder / f"{epochs}", "resnet20", row, bits, 80.0 + seed, seed=seed, epochs=epochs, **other)
    return replace(run, setting={"row": row, "epochs": epochs})


def test_a_cell_takes_the_setting_with_the_most_cells_and_seeds(tmp_path: Path) -> None:
    """Also where another setting has more seeds in the cell itself, or comes first; of equals, the first counts."""
    many = [_of_epochs(tmp_path, row, seed, 6) for row in ("octav_ste", "octav") for seed in (0, 1)]
    trial = [_of_epochs(tmp_path, "max", seed, 9) for seed in (0, 1, 2)]
    ours = [*trial, _of_epochs(tmp_path, "max", 5, 6), *many]
    table = make_table("table1", ours, "imagenet", "resnet20")
    assert [row.values for row in table.rows] == [(), (85.0,), (80.0, 81.0), (), (), (80.0, 81.0)]
    assert table.left_out == [f"{run.folder} (epochs)" for run in trial] and not table.unlike
    for order in ((6, 9), (9, 6)):
        runs = [_of_epochs(tmp_path, row, 0, epochs) for row in ("max", "octav") for epochs in order]
        table = make_table("table1", [*runs[:2], *runs[:1:-1]], "imagenet", "resnet20")
        assert {run.config.epochs for row in table.rows for run in row.runs} == {order[0]} and not table.unlike


def test_a_repetition_counts_once(tmp_path: Path) -> None:
    """Of full precision as well. The run under its usual name counts, although the other comes first by name."""

    def runs(row: str, value: float) -> list[Run]:
        other = _run(tmp_path, "resnet20", row, None if row == "full_precision" else 4, 10.0)
        usual = replace(other, folder=tmp_path / run_name(other.config), summary={"top1": value})  # type: ignore[typeddict-item]
        return [other, usual]

    full, octav = runs("full_precision", 90.0), runs("octav", 88.0)
    table = make_table("table1", [*full, *octav], "imagenet", "resnet20")
    assert [(row.values, row.gaps) for row in table.rows if row.runs] == [((90.0,), ()), ((88.0,), (-2.0,))]
    assert table.left_out == [f"{some[0].folder} (repeats {some[1].folder})" for some in (full, octav)]


def test_a_start_is_that_of_the_weights_that_were_retrained(tmp_path: Path) -> None:
    """Only evaluations of the same weights count; those of one file serve all seeds."""

    def table(*starts: str) -> TableOfRuns:
        runs = [_run(tmp_path, "resnet50", "pretrained", None, 93.0, weights="x.pt")]
        for seed, weights in enumerate(starts):
            runs += [_run(tmp_path, "resnet50", "octav", 4, 91.0 + seed, mode="retrain", seed=seed, weights=weights)]
        return make_table("table3", runs, "imagenet", "resnet50")

    of_one = table("x.pt", "x.pt")
    assert [row.gaps for row in of_one.rows if row.values] == [(), (-2.0, -1.0)] and not of_one.unlike
    of_each = table("x.pt", "y.pt", "z.pt")
    assert [row.gaps for row in of_each.rows if row.values] == [(), (-2.0,)] and not of_each.unlike
    assert "-2.00 (1)" in of_each.columns["against full precision"]
    of_two = table("x.pt", "y.pt", "y.pt")
    assert [row.values for row in of_two.rows if row.runs] == [(93.0,), (92.0, 93.0)]
    assert of_two.left_out == [f"{tmp_path / 'resnet50-octav-4-0'} (weights)"]


def test_rows_that_start_elsewhere_are_told(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path, "resnet50", row, 4, 90.0, mode="retrain", seed=seed, weights=weights)
        for row, starts in (("max", "xy"), ("octav", "xz"), ("static_octav", "xy"))
        for seed, weights in enumerate(starts)
    ]
    (message,) = make_table("table3", runs, "imagenet", "resnet50").unlike
    assert message == "Rows with other settings than resnet50, Static OCTAV, 4 bits: OCTAV (MPH), 4 bits (weights)."


def test_tables_that_are_not_the_papers() -> None:
    """The numbers of LSQ and PACT come from their own papers, so no differences are computed from them."""
    learned = make_table("learned", [], "imagenet")
    assert list(learned.columns)[-1] == "published %"
    assert published("learned", "resnet18", "lsq", 3) == 70.2
    assert published("learned", "resnet50", "pact", 2) == 72.2
    assert published("learned", "resnet18", "pretrained", None) is None
    assert published("learned", "resnet18", "octav", 4) is None
    assert "Published numbers: Esser et al., ICLR 2020, Table 1" in learned.text("markdown")
    distillation = make_table("distillation", [], "imagenet")
    assert not any("published" in head for head in distillation.columns)
    assert "Published" not in distillation.text("markdown")


def test_no_word_is_left_of_numbers_that_were_not_known() -> None:
    files = [path for path in Path(tables.__file__).parent.iterdir() if path.suffix in (".py", ".yaml")]
    assert "paper.yaml" in {path.name for path in files}
    for path in files:
        assert not re.search(r"second.hand|unknown", path.read_text()), path


# Table 6


@pytest.fixture
def timing() -> table6.Timing:
    timing = table6.Timing("Two layers")
    for bits in table6.BITS:
        for kind, tensors, octav, sweep in (("weight", 2, 0.002, 0.1 * bits), ("activation", 20, 0.01, 2.0)):
            timing.tensors[kind] = tensors
            timing.seconds[kind, "octav", bits] = tensors * octav
            timing.seconds[kind, "mse_sweep", bits] = tensors * sweep
    return timing


@pytest.mark.parametrize("layout", ["markdown", "csv", "latex", "html"])
def test_table6(timing: table6.Timing, layout: str) -> None:
    text = timing.table().text(layout)
    heads, *rows = _read(text, layout)
    assert heads[8:] == [
        *("seconds a tensor", "seconds a tensor, published (Xeon, NumPy)"),
        *("in all", "in all, published (Xeon, NumPy)"),
    ]
    assert [row[:3] + row[8:] for row in rows] == [
        ["weights", "2", "OCTAV", "0.002", "0.191", "0:00.00", "0:14"],
        ["weights", "2", "MSE sweep", "0.6", "1.943", "0:01.20", "2:24"],
        ["weights", "", "sweep / OCTAV", "300", "10.2", "", ""],
        ["activations", "20", "OCTAV", "0.01", "0.497", "0:00.20", "10:06"],
        ["activations", "20", "MSE sweep", "2", "3.141", "0:40", "1:03:52"],
        ["activations", "", "sweep / OCTAV", "200", "6.3", "", ""],
    ]
    assert [row[3:8] for row in rows][1] == ["0.4", "0.5", "0.6", "0.7", "0.8"]
    if layout != "csv":
        assert "74 weight and 1220 activation tensors, on a Xeon with NumPy" in text


def test_table6_of_a_network_whose_activations_are_not_quantized(timing: table6.Timing) -> None:
    timing.tensors["activation"] = 0
    timing.seconds = {key: seconds for key, seconds in timing.seconds.items() if key[0] == "weight"}
    assert [row[0] for row in timing.table().cells] == ["weights"] * 3


@pytest.mark.parametrize(
    ("layers", "chosen"), [("", ""), ("a", "a"), ("ab", "ab"), ("abc", "b"), ("abcde", "bcd"), ("abcdefg", "bdf")]
)
def test_the_layers_of_figure_1(layers: str, chosen: str) -> None:
    assert three_of(layers) == {*chosen}


def test_the_published_seconds_in_all_are_those_of_a_tensor_times_their_number() -> None:
    for known in (paper()["table6"][kind] for kind in ("weight", "activation")):
        for method in ("octav", "mse_sweep"):
            each, total = known[method]
            assert total == pytest.approx(known["tensors"] * each, abs=0.5 + 0.0005 * known["tensors"])


def test_the_synthetic_tensors_are_the_papers_74_and_1220(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table6, "METHODS", {name: lambda *args, **kwargs: torch.ones(()) for name in table6.METHODS})
    assert table6.synthetic().tensors == {"weight": 74, "activation": 1220}


# Figure 4


def _curve(run: Run, *top1: float) -> Run:
    run.folder.mkdir(parents=True)
    lines = [f"{epoch},{value}" for epoch, value in enumerate(top1, 1)]
    (run.folder / "metrics.csv").write_text("\n".join(["epoch,val_top1", *lines]) + "\n")
    return run


def test_figure4_has_all_six_runs_and_says_which_are_missing(tmp_path: Path) -> None:
    rows = paper()["table1"]["rows"]
    runs = [
        _curve(_run(tmp_path, "resnet20", row, None if row == "full_precision" else 4, 50.0), 10.0 + i, 50.0 + i)
        for i, row in enumerate(rows)
    ]
    figure = figure4(runs, "imagenet")
    (ax,) = figure.axes
    assert [list(line.get_ydata()) for line in ax.lines] == [[10.0 + i, 50.0 + i] for i in range(6)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [paper()["labels"][row] for row in rows]
    assert not ax.get_legend().get_title().get_text()
    plt.close(figure)
    figure = figure4([runs[0], runs[5]], "imagenet")
    legend = figure.axes[0].get_legend().get_title().get_text()
    assert legend == "missing: Max-scaled, OCTAV (STE), OCTAV (PWL), OCTAV (MAD)"
    plt.close(figure)


def test_figure4_tells_of_rows_of_other_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [
        _curve(_run(tmp_path, "resnet20", row, 4, 50.0, epochs=2 + (row == "max")), 50.0) for row in ("max", "octav")
    ]
    plt.close(figure4(runs, "imagenet"))
    assert (
        "Rows with other settings than resnet20, Max-scaled, 4 bits: OCTAV (MPH), 4 bits (epochs)." in caplog.messages
    )


def test_figure4_draws_the_runs_of_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Among the unfinished runs, these are the ones with a new seed of the finished runs' setting."""
    runs = [_curve(_of_epochs(tmp_path, row, 0, 2), 50.0, 60.0) for row in ("full_precision", "octav")]
    trials = [_curve(_of_epochs(tmp_path, row, 0, 9), 1.0, 2.0, 3.0) for row in ("full_precision", "octav")]
    again = _curve(replace(runs[1], folder=tmp_path / "again", summary=None), 5.0)
    new = _curve(replace(_of_epochs(tmp_path, "octav", 1, 2), summary=None), 70.0)
    unfinished = [replace(trials[1], summary=None), again, new]
    figure = figure4([*unfinished, trials[0], *runs], "imagenet")
    ax = figure.axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[50.0, 60.0], [60.0, 60.0]]
    assert ax.get_legend().get_texts()[1].get_text() == "OCTAV (MPH), 1 of 2 seeds reach the last epoch"
    (message,) = caplog.messages
    for run, why in ((trials[0], "epochs"), (trials[1], "epochs"), (again, f"repeats {runs[1].folder}")):
        assert f"{run.folder} ({why})" in message
    plt.close(figure)
    assert f"Unfinished: {new.folder}." in make_table("table1", [*unfinished, *runs], "imagenet").notes()


def test_figure4_draws_a_sweep_of_which_no_run_is_finished(tmp_path: Path) -> None:
    runs = [_curve(replace(_of_epochs(tmp_path, "octav", seed, 6), summary=None), 50.0) for seed in (0, 1)]
    other = _curve(replace(_of_epochs(tmp_path, "octav", 0, 9), summary=None), 10.0)
    figure = figure4([other, *runs], "imagenet")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[50.0]]
    plt.close(figure)


def test_figure4_is_of_one_network(tmp_path: Path) -> None:
    """Runs of two networks are not averaged."""
    runs = [_curve(_run(tmp_path, model, "octav", 4, 50.0), 10.0, 50.0) for model in ("resnet18", "resnet50")]
    runs += [_curve(_run(tmp_path, "resnet50", "octav", 6, 50.0), 90.0, 90.0)]  # Table 2's
    with pytest.raises(ConfigError, match="figure4: there are runs of resnet18, resnet50: choose one with --model"):
        figure4(runs, "imagenet")
    figure = figure4(runs, "imagenet", "resnet50")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[10.0, 50.0]]
    plt.close(figure)
