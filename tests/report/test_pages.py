"""The HTML reports of qat-report: their content, and that a browser renders them."""

import base64
import csv
import functools
import gzip
import html
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from qat_runner.cli.report import main as report
from qat_runner.cli.run import main as qat_run
from qat_runner.config import Config, from_hydra, identity, plain, run_name
from qat_runner.config.composing import command, compose_config
from qat_runner.insertion import calibrate, quantize_model
from qat_runner.insertion.size import size_mb
from qat_runner.report import compare_page, run_page
from qat_runner.report.differing import shown
from qat_runner.report.entries import entries
from qat_runner.report.page import LARGEST, TRACE_TYPES
from qat_runner.report.settings import sections
from qat_runner.report.tensor_charts import _levels
from qat_runner.runs.folder import RunFolder
from qat_runner.training.histograms import BINS, REACH, histograms
from tests.report.browser import CHROMIUM, Page, browser

SMALL = (
    *("backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8"),
    *("dataset.fake_pictures=64", "batch_size=32"),
)


@functools.cache
def config_of(*overrides: str) -> Config:
    others = tuple(word for word in overrides if not word.startswith("seed="))
    if len(others) == len(overrides) - 1:  # no other key depends on the seed, and composing takes most of the time
        (seed,) = {*overrides} - {*others}
        return replace(config_of(*others), seed=int(seed.partition("=")[2]))
    small = [word for word in SMALL if "mode=allocate" not in overrides or not word.startswith("batch_size=")]
    return from_hydra(compose_config([*small, *overrides]))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


LAYERS = ("conv1", "features.10.block.2.very.long.name.of.a.layer.indeed", "fc")


def layer_rows(epochs: int, layers: Sequence[str] = LAYERS) -> list[dict[str, Any]]:
    common = {"bits": 4, "signed": True, "granularity": "tensor", "mse": 1e-4, "clipped_fraction": 0.01}
    return [
        {"epoch": e, "layer": layer, "tensor": tensor, **common, "s": 1 + e / 10, "sqnr_db": 20 - i, "max_sqnr_db": 15}
        for e in range(epochs + 1)
        for i, layer in enumerate(layers)
        for tensor in ("weight", "input")
    ]


def histogram(layer: str, bits: int = 4) -> dict[str, Any]:
    ends = {"low": -1.5, "high": 1.5, "lowest": -9.0, "highest": 1.5}
    kind = {"layer": layer, "tensor": "weight", "bits": bits, "signed": True, "granularity": "channel"}
    return {**kind, "s": 0.25, **ends, "beyond": 2, "counts": list(range(BINS))}


ENVIRONMENT = {
    "command": ["qat-run", "bits=4", "+note=two words"],
    "directory": "/somewhere",
    "started": "2026-01-01T00:00:00+00:00",
    "python": "3.12.0",
    "packages": {"torch": "2.11", "numpy": "2.0"},
    "git": {"commit": "abc123", "branch": "main", "dirty": True},
    "machine": {"platform": "Linux", "processor": "a CPU", "cores": 2, "torch_threads": 2, "gpus": [], "cuda": None},
    "processes": 1,
}


POINT: dict[str, Any] = {"costs": {"MB": 1.5}, "rise": 0.25, "value": 60.0}
TENSOR: dict[str, Any] = {
    "layer": "fc",
    "tensor": "weight",
    "elements": 640,
    "bits": 4,
    "noise": {"4": 0.1},
    "price": {"4": 0.2, "8": 0.01},
    "beside": {"4": 0.3},
}
ALLOCATED: dict[str, Any] = {
    "answer": "it lives with 4 bits",
    "cost": "size_mb",
    "figures": ["MB"],
    "price": "gradient",
    "beside": "measured",
    "metric": "top1",
    "reference": 61.0,
    "chosen": POINT,
    "uniform": [POINT | {"width": 4}],
    "front": [POINT],
    "tensors": [TENSOR],
    "stability": 0.5,
    "seconds": 2.0,
    "retrain_steps": 0,
}


def make_run(runs: Path, *overrides: str, name: str | None = None, top1: float | None = 60.0, epochs: int = 2) -> Path:
    """Create a run folder as qat-run leaves it; top1=None: unfinished."""
    config = config_of(*overrides)
    folder = runs / (name or run_name(config))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(plain(config), Dumper=yaml.CSafeDumper, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    splits = {"train_loss": 1.0, "train_top1": 50.0, "val_loss": 1.1, "val_top1": 55.0, "val_top5": 90.0}
    write_rows(folder / "metrics.csv", [{"epoch": e + 1, **splits, "lr": 0.1, "seconds": 9.0} for e in range(epochs)])
    write_rows(folder / "steps.csv", [{"epoch": 1, "step": i, "loss": 2 - i / 3000, "lr": 0.1} for i in range(2500)])
    if not config.quantization.full_precision:
        write_rows(folder / "layers.csv", layer_rows(epochs))
        (folder / "histograms.json").write_text(json.dumps([histogram(layer, 6) for layer in LAYERS]))
    if top1 is not None:
        full = config.quantization.full_precision
        summary = {
            "model": config.model.name,
            "dataset": config.dataset.name,
            "mode": config.mode,
            "seed": config.seed,
            "clipping": "none" if full else config.clipping.name,
            "gradient": "mph",
            "metric": "top1",
            "top1": top1,
            "best_top1": top1 + 1,
            "epochs": epochs,
            "seconds": 90.0,
            "sqnr_db": None if full else 20.0,
            "size_mb": 0.5,
            "fp32_size_mb": 4.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def text_of(path: Path) -> str:
    """Return the text of a page, without scripts, styles and tags."""
    page = re.sub(r"<(script|style).*?</\1>|<wbr>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def charts_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the charts of a page by id; check the size of the page and that the bundle supports all trace types."""
    assert path.stat().st_size <= LARGEST
    found = re.search(r'<script type="application/gzip" id="charts">(.*?)</script>', path.read_text())
    assert found is not None
    charts = json.loads(gzip.decompress(base64.b64decode(found[1])))
    assert {trace["type"] for c in charts for view in c["views"] for trace in view["traces"]} <= {*TRACE_TYPES}
    return {chart["id"]: chart for chart in charts}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two epochs."""
    runs = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs)
        assert qat_run([*SMALL, "epochs=2", f"run_dir={runs / 'run'}"]) == 0
    return runs / "run"


def test_a_run_records_histograms_and_sizes(real: Path) -> None:
    found = json.loads((real / "histograms.json").read_text())
    assert len(found) == 2 * 20  # weight and input of 20 layers
    first = found[0]
    assert (first["layer"], first["tensor"], first["bits"], first["granularity"]) == ("conv1", "weight", 8, "channel")
    assert sum(first["counts"]) + first["beyond"] == 16 * 3 * 3 * 3
    inputs = next(h for h in found if (h["layer"], h["tensor"]) == ("layer1.0.conv1", "input"))
    assert inputs["low"] == 0 and not inputs["signed"]
    summary = json.loads((real / "summary.json").read_text())
    assert summary["fp32_size_mb"] / 8 < summary["size_mb"] < summary["fp32_size_mb"] / 6


def test_the_page_of_a_real_run(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(real)]) == 0
    assert capsys.readouterr().out == f"{real / 'report.html'}\n"
    text = text_of(real / "report.html")
    for word in ("resnet20 on fake at 4 bits", "top1", "mean SQNR", "octav", "times as large", "layer3.2.conv2"):
        assert word in text
    line = re.search(r"qat-run model=resnet20 [^ ]*( [a-z_.]+=[^ ]+)+", text)
    assert line is not None
    assert identity(from_hydra(compose_config(shlex.split(line[0])[1:]))) == identity(config_of("epochs=2"))
    assert set(charts_of(real / "report.html")) == {
        *("accuracy", "loss", "step-loss", "learning-rate", "noise-weights", "noise-activations"),
        *("histogram", "scalar"),
    }


def test_the_page_belongs_to_the_run() -> None:
    ours = {path.name for path in RunFolder(Path()).contents}
    assert {"report.html", "histograms.json"} <= ours  # a folder with a report may still be resumed or overwritten


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x))
        return y


def two(bits: int = 4, granularity: str = "channel") -> nn.Module:
    return quantize_model(
        Two(), bits, "max", first_last_bits=None, linear_granularity=granularity, example=torch.randn(2, 4)
    )


def test_histograms_are_in_units_of_the_scalars() -> None:
    model = two()
    with torch.no_grad():
        model.get_submodule("first").weight[0] *= 100  # type: ignore[operator]
    batches = [torch.randn(5, 4), 50 * torch.randn(6, 4)]
    weight, inputs = histograms(model, batches)[:2]
    assert (weight["layer"], weight["tensor"], weight["granularity"], weight["bits"]) == (
        "first",
        "weight",
        "channel",
        4,
    )
    assert -1.01 <= weight["low"] < weight["high"] <= 1.01 and sum(weight["counts"]) == 12  # max-scaling clips nothing
    assert inputs["granularity"] == "tensor" and len(inputs["counts"]) == BINS
    assert sum(inputs["counts"]) + inputs["beyond"] == 11 * 4  # inputs of both batches; a weight counts once
    assert model.training


def test_levels_on_record_are_the_quantizer_s_own() -> None:
    model = quantize_model(Two(), 2, "pact", alpha=2.0, first_last_bits=None, example=torch.randn(2, 4))
    calibrate(model, [torch.randn(5, 4)])
    weight, inputs = histograms(model, [torch.randn(5, 4)])[:2]
    assert weight["levels"] == pytest.approx([-1, -1 / 3, 1 / 3, 1]) and inputs["levels"] == [-1, 0, 1]
    assert histograms(two(), [torch.randn(5, 4)])[0]["levels"] == [code / 8 for code in range(-8, 8)]
    before = histogram("first", 3)  # from a run before levels were recorded
    assert _levels(before) == [code / 4 for code in range(-4, 4)]
    assert _levels(before | {"levels": inputs["levels"]}) == [-1, 0, 1]
    assert _levels(before | {"bits": 8}) == []


def test_histograms_of_outliers_and_of_nothing_but_zeros() -> None:
    model = quantize_model(Two(), 4, "percentile", q=50.0, first_last_bits=None, example=torch.randn(2, 4))
    far = histograms(model, [torch.cat([torch.ones(4, 4), torch.full((1, 4), -1000.0)])])[1]
    assert far["low"] == -REACH and far["lowest"] == pytest.approx(-1000) and far["beyond"] == 4
    zeros = histograms(two(), [torch.zeros(3, 4)])[1]
    assert sum(zeros["counts"]) == 12 and zeros["low"] < zeros["high"]


def test_size() -> None:
    weights, biases = 4 * 3 + 3 * 2, 3
    assert size_mb(Two()) == pytest.approx((4e-6 * (weights + biases),) * 2)
    scalars = {"channel": 3 + 2 + 2, "tensor": 2 + 2}  # for weights and for inputs
    for granularity, count in scalars.items():
        small, full = size_mb(two(4, granularity))
        assert full == pytest.approx(4e-6 * (weights + biases))
        assert small == pytest.approx(0.5e-6 * weights + 4e-6 * (biases + count))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("bits=32",),
        ("bits=8", "weight_bits=2", "clipping=pact", "clipping.alpha=6.5"),
        ("clipping=static_percentile", "clipping.q=99.9", "mode=retrain", "weights=baseline", "recipe.retrain.lr=0.5"),
        ("mode=ptq", "weights='/a b/it\\'s=here, {x}.pt'", "gradient=pwl"),
        (
            "dataset.mean=[0.25]",
            "clipping.warm_iterations=null",
            "seed=3",
            "lr=1e-5",
            "recipe.distill=full_precision",
            "recipe.teacher=t.pt",
        ),
        ("recipe=cifar10", "epochs=7", "recipe.scratch.max_grad_norm=1.5", "data_dir=/elsewhere"),
    ],
)
def test_the_command_gives_the_same_run(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    line = command(config)
    assert line is not None
    again = from_hydra(compose_config(shlex.split(line)[1:]))
    assert (run_name(again), identity(again), again.data_dir) == (run_name(config), identity(config), config.data_dir)


def test_no_command_where_none_gives_the_same_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    config = config_of()
    stage = config.recipe.scratch  # no shipped recipe for images has such a stage
    config = replace(config, mode="finetune", recipe=replace(config.recipe, finetune=stage))
    assert command(config) is None
    (folder / "config.yaml").write_text(yaml.dump(plain(config), Dumper=yaml.CSafeDumper, sort_keys=False))
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert "qat-run bits=4 '+note=two words'" in text
    assert "This is the recorded command, started in /somewhere ." in text


def test_settings_that_differ_from_the_defaults() -> None:
    found = {
        (title, row.key): row for title, rows in sections(config_of("bits=6", "lr=0.5", "runs_dir=x")) for row in rows
    }
    changed = {key for key, row in found.items() if row.changed}
    assert changed == {
        *(("run", key) for key in ("bits", "lr", "batch_size", "backend") if key != "batch_size"),
        *(("model", key) for key in ("name",)),
        *(("dataset", key) for key in ("name", "image_size", "fake_pictures")),
    }
    assert (found["run", "lr"].value, found["run", "lr"].default) == ("0.5", "0.05")
    assert found["run", "bits"].default == "4" and found["model", "name"].default == "resnet18"
    assert found["paths and bookkeeping", "runs_dir"].value == "x"
    assert [title for title, _ in sections(config_of())][1:-1] == [
        *("model", "dataset", "clipping", "gradient", "recipe", "allocation", "oscillations")
    ]


def test_values_are_shown_as_one_writes_them() -> None:
    assert [shown(v) for v in (None, True, 0.0002, 99.99, [1, 2], "x")] == [
        *("null", "true", "0.0002", "99.99", "[1, 2]", "x")
    ]


def test_headline_figures(tmp_path: Path) -> None:
    make_run(tmp_path, "bits=32", top1=62.5)
    folder = make_run(tmp_path, top1=60.0)
    text = text_of(run_page.write(folder, folder / "report.html"))
    for words in (
        *("top1 60.00 % best 61.00 %", "mean SQNR 20.0 dB", "clipping octav"),
        "against fp32 -2.50 points; fp32 is the same run without quantization",
        *("size 0.5 MB 4 MB in fp32, 8.0 times as large", "time 90 s 2 epochs"),
        "Noisiest: fc.weight (18.0 dB), fc.input (18.0 dB)",
        "not finished",
    ):
        assert (words in text) == (words != "not finished"), words
    assert "a CPU, 2 cores" in text and "abc123 on main, with uncommitted changes" in text


@pytest.mark.parametrize(("rows", "folded"), [(4, 0), (40, 1), (50_000, 1)])
def test_what_is_quantized_stands_on_the_page(tmp_path: Path, rows: int, folded: int) -> None:
    folder = make_run(tmp_path)
    assert 'id="quantized"' not in run_page.write(folder, tmp_path / "page.html").read_text()  # as for older runs
    lines = [f"layer{i}  weight  4  <b>" for i in range(rows)]
    below = "in full precision: 7 BatchNorm2d, softmax\na note"
    (folder / "quantizers.txt").write_text("\n".join(["layer  tensor  bits", *lines]) + f"\n\n{below}\n")
    page = run_page.write(folder, tmp_path / "page.html")
    assert below in page.read_text() and "layer0 weight 4 <b>" in text_of(page)
    assert page.stat().st_size <= LARGEST and page.read_text().count("<details>") == folded
    left = re.search(r"layer(\d+) weight 4 <b> \.\.\. and (\d+) more lines", text_of(page))
    assert (left is None) == (rows < 1000)
    assert left is None or int(left[1]) + 1 + int(left[2]) == rows


def test_limits_stand_beside_what_they_are_of(tmp_path: Path) -> None:
    limits = "limit_train_batches=5", "limit_val_batches=2"
    suffix = "; at most 5 batches per epoch; at most 2 validation batches"
    done, begun = make_run(tmp_path, *limits), make_run(tmp_path, *limits, "seed=1", top1=None)
    assert f"best 61.00 %{suffix}" in text_of(run_page.write(done, tmp_path / "page.html"))
    assert f"best 55.00 %{suffix}" in text_of(run_page.write(begun, tmp_path / "page.html"))


def test_a_run_that_chooses_bits_has_no_sections_that_it_never_fills(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "mode=allocate", "weights=baseline", "budget=4")
    for name in ("histograms.json", "steps.csv", "metrics.csv", "layers.csv"):
        (folder / name).unlink()
    (folder / "allocation.json").write_text(json.dumps(ALLOCATED))
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert "Bit allocation" in text and "recorded" not in text
    assert "With other batches of the same kind, the bits of a tensor would change by 0.50 on average." in text
    assert not any(head in text for head in ("Training", "Quantization noise", "Tensors", "Single tensors"))


def test_networks_that_were_measured_on_the_way_to_bits_are_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "mode=allocate", "weights=baseline", "budget=4")
    points = [ALLOCATED["chosen"] | {"costs": {"MB": mb}, "value": top1} for mb, top1 in ((2.0, 59.0), (1.0, 50.0))]
    uniform = [point | {"width": bits} for bits, point in enumerate((points[0], points[1] | {"value": None}), 3)]
    (folder / "allocation.json").write_text(
        json.dumps(ALLOCATED | {"measured": points, "uniform": uniform, "stability": None})
    )
    page = run_page.write(folder, tmp_path / "page.html")
    (view,) = charts_of(page)["measured"]["views"]
    assert "With other batches" not in text_of(page)  # there was only one batch
    drawn = {trace["name"]: (trace["x"], trace["y"]) for trace in view["traces"]}
    assert drawn["chosen bits"] == ([1.0, 2.0], [50.0, 59.0]) and drawn["uniform"] == ([2.0], [59.0])
    assert drawn["full precision"] == ([1.0, 2.0], [61.0, 61.0]) and drawn["result"][1] == [60.0]


def test_the_page_says_which_full_precision_it_means(tmp_path: Path) -> None:
    make_run(tmp_path, "bits=32", top1=62.5)
    folder = make_run(tmp_path, "mode=retrain", "weights=baseline", top1=60.0)
    against = "against fp32 {} points; fp32 is {}"
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert against.format("-2.50", "the network that it starts from") in text
    make_run(tmp_path, "mode=retrain", "weights=baseline", "bits=32", top1=63.0)
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert against.format("-3.00", "the same run without quantization") in text


def test_tensors_without_noise_on_record_come_last(tmp_path: Path) -> None:
    """This holds wherever tensors are sorted by noise."""
    folder = make_run(tmp_path)
    names = [f"layer{i}" for i in range(30)]
    rows = [row | {"sqnr_db": float(i)} for i, row in enumerate(layer_rows(0, names)) if row["tensor"] == "weight"]
    for row, sqnr in zip(rows, (20.0, None, 50.0, 30.0, 10.0), strict=False):
        row["sqnr_db"] = sqnr
    write_rows(folder / "layers.csv", rows)
    (folder / "histograms.json").write_text(json.dumps([histogram(name) for name in names]))
    page = run_page.write(folder, tmp_path / "page.html")
    assert "Noisiest: layer4.weight (10.0 dB), layer5.weight (10.0 dB), layer6.weight (12.0 dB)." in text_of(page)
    charts = charts_of(page)
    sqnr = charts["noise-weights"]["views"][0]["traces"][1]["x"]
    assert len(sqnr) == 20 and sqnr == sorted(sqnr) and sqnr[0] == 10
    assert charts["histogram"]["views"][-1]["label"] == "layer1.weight"
    for row in rows:
        row["sqnr_db"] = None
    write_rows(folder / "layers.csv", rows)
    assert "Noisiest" not in text_of(run_page.write(folder, tmp_path / "page.html"))


def test_every_head_of_a_table_has_a_name(pages: dict[str, Path]) -> None:
    """Screen readers read the header of a sortable column by its name."""
    for path in pages.values():
        heads = re.findall(r"<th\b[^>]*>(.*?)</th>", path.read_text(), flags=re.DOTALL)
        assert heads and all(re.sub(r"<[^>]+>", "", head).strip() for head in heads)


def test_figures_of_costs_are_figures(pages: dict[str, Path]) -> None:
    """So their cells do not wrap."""
    _, _, rest = pages["chosen"].read_text().partition('<table id="costs">')
    rows = [re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row) for row in rest.partition("</table>")[0].split("</tr>")]
    assert [cells[0][1] for cells in rows if cells] == [
        "bits",
        "full precision",
        "chosen",
        "3 everywhere",
        "4 everywhere",
    ]
    assert all('class="number"' in kind for cells in rows for kind, _ in cells[1:])
    assert [text for _, text in rows[2]] == ["chosen", "4.12", "4", "0.0412", "0.0845", "0.0123", "60.00"]


def test_effective_bits_and_what_is_quantized_are_shown_where_they_are_on_record(tmp_path: Path) -> None:
    make_run(tmp_path, "bits=32")
    folder = make_run(tmp_path)
    assert "activation bits" not in text_of(compare_page.write([tmp_path], tmp_path / "compare.html"))
    summary = json.loads((folder / "summary.json").read_text())
    means = {"mean_weight_bits": 4.016, "mean_activation_bits": 4.125, "quantized_macs": 99.25}
    (folder / "summary.json").write_text(json.dumps(summary | means))
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert "bits 4 on average 4.02 (weights), 4.12 (activations), over all quantized tensors" in text
    assert "quantized 99.25 % of the multiply-accumulates" in text
    text = text_of(compare_page.write([tmp_path], tmp_path / "compare.html"))
    assert "weight bits activation bits quantized %" in text and " 4.02 4.12 99.25 " in text


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path, top1=None)
    (folder / "histograms.json").unlink()
    (folder / "error.txt").write_text("the loss became nan\n\nTraceback ...")
    page = run_page.write(folder, tmp_path / "page.html")
    text = text_of(page)
    assert "This run is not finished: it failed (the loss became nan)" in text
    assert "2 of 2" in text and "top1 so far 55.00 %" in text
    assert "the folder has no histograms.json" in text
    assert {"accuracy", "noise-weights", "scalar"} <= set(charts_of(page))


def test_sittings_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    later = ENVIRONMENT | {"started": "2026-01-02T00:00:00+00:00", "packages": {"torch": "2.12", "numpy": "2.0"}}
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"resumed": [later]}))
    assert "resumed 2026-01-02T00:00:00+00:00, with different torch" in text_of(
        run_page.write(folder, tmp_path / "p.html")
    )


def test_records_of_old_have_pages_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(
        json.dumps({key: value for key, value in summary.items() if not key.endswith(("metric", "mb"))})
    )
    for name in ("histograms.json", "environment.json", "steps.csv", "metrics.csv", "layers.csv"):
        (folder / name).unlink()
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert "top1 60.00 %" in text
    for sentence in ("No training is recorded", "No noise is recorded yet", "The folder has no environment.json"):
        assert sentence in text


def test_a_full_precision_run_says_that_nothing_is_quantized(tmp_path: Path) -> None:
    text = text_of(run_page.write(make_run(tmp_path, "bits=32"), tmp_path / "page.html"))
    assert "in full precision" in text and text.count("Nothing is quantized in this run.") == 2
    assert "qat-run model=resnet20 dataset=fake bits=32" in text


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    charts = charts_of(run_page.write(make_run(tmp_path), tmp_path / "page.html"))
    assert charts["step-loss"]["heading"] == "Training loss by step, means of 3"
    trace = charts["step-loss"]["views"][0]["traces"][0]
    assert len(trace["x"]) == 834 and trace["x"][-1] == 2500


def test_many_tensors_show_the_noisiest_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write_rows(folder / "layers.csv", layer_rows(1, [f"net.layer.{i}.with.a.long.name.{i}" for i in range(40)]))
    chart = charts_of(run_page.write(folder, tmp_path / "page.html"))["noise-weights"]
    first, whole = chart["views"]
    assert first["label"] == "the 20 noisiest" and len(first["traces"][0]["x"]) == 20
    assert len(whole["traces"][0]["x"]) == 40
    labels = whole["layout"]["yaxis"]["ticktext"]
    assert labels[39] == "39.with.a.long.name.39" and max(map(len, labels)) <= 27


def test_oscillating_weights_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    found = json.loads((folder / "summary.json").read_text())
    found |= {"oscillating_weights": 1.25, "frozen_weights": 3.0, "before_reestimation": 41.0, "batchnorm_batches": 50}
    (folder / "summary.json").write_text(json.dumps(found))
    sizes = {"conv1": 10, "fc": 30}
    write_rows(
        folder / "oscillations.csv",
        [
            {"epoch": e, "layer": layer, "elements": size, "oscillating": e * size / 10, "frozen": e}
            for e in (1, 2)
            for layer, size in sizes.items()
        ],
    )
    page = run_page.write(folder, tmp_path / "page.html")
    whole, layers = (
        charts_of(page)[name]["views"][0]["traces"] for name in ("oscillations-all", "oscillations-layers")
    )
    assert [trace["y"] for trace in whole] == [[2.5, 5.0], [1.0, 2.0]] and layers[0]["x"] == [2.0, 6.0]
    assert "oscillating weights 1.2 % of the tracked weights; 3 % are frozen" in text_of(page)
    assert "top1 before BatchNorm re-estimation 41.00 % then re-estimated on 50 batches" in text_of(page)


HOSTILE = "a</script><script>alert(1)</script>&\"'{{ 7 * 7 }}"


def test_a_hostile_name_does_no_harm(tmp_path: Path) -> None:
    folder = make_run(tmp_path, name=HOSTILE.replace("/", "\u2215"))
    make_run(tmp_path, "seed=1")
    write_rows(folder / "layers.csv", layer_rows(1, [HOSTILE]))
    (folder / "histograms.json").write_text(json.dumps([histogram(HOSTILE)]))
    one = run_page.write(folder, tmp_path / "page.html")
    both = compare_page.write([tmp_path], tmp_path / "compare.html")
    assert HOSTILE in charts_of(one)["noise-weights"]["views"][0]["traces"][0]["text"][0]
    for page in (one, both):
        assert "<script>alert" not in page.read_text()
        assert page.read_text().count("</script") == 3  # Plotly, the charts, the page's own
        assert "{{ 7 * 7 }}" in text_of(page)


@pytest.mark.slow
def test_pages_of_much_are_small(tmp_path: Path) -> None:
    """A run as large as ResNet-101 with 150 epochs, and a sweep of 60 such runs."""
    folder = make_run(tmp_path, epochs=150)
    layers = [f"layer{i // 30 + 1}.{i}.conv{i % 3}" for i in range(104)]
    rows = layer_rows(150, layers)
    for i, row in enumerate(rows):
        row["s"] = 1 + math.sin(i) / 3
    write_rows(folder / "layers.csv", rows)
    counts = [int(1e5 * abs(math.sin(i * i))) for i in range(BINS)]
    (folder / "histograms.json").write_text(
        json.dumps(
            [
                histogram(layer, 6) | {"tensor": kind, "counts": counts[i:] + counts[:i]}
                for i, layer in enumerate(layers)
                for kind in ("weight", "input")
            ]
        )
    )
    for seed in range(1, 60):
        shutil.copytree(folder, tmp_path / f"seed{seed}", ignore=shutil.ignore_patterns("*.csv", "histograms.json"))
        shutil.copy(folder / "metrics.csv", tmp_path / f"seed{seed}")
    one = run_page.write(folder, tmp_path / "page.html")
    many = compare_page.write([tmp_path], tmp_path / "compare.html")
    assert "histogram" in charts_of(one) and "curves" in charts_of(many)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", "bits=32", top1=70.0)
    for seed, top1 in enumerate((60.0, 64.0, 65.0)):
        make_run(tmp_path / "a", "bits=4", f"seed={seed}", top1=top1)
    make_run(tmp_path / "a", "bits=8", top1=69.0)
    other = make_run(tmp_path / "b", "clipping=max", "gradient=ste", top1=None)
    assert report(["compare", str(tmp_path / "a"), str(other), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "compare.html"
    assert capsys.readouterr().out == f"{page}\n"
    text, charts = text_of(page), charts_of(page)
    assert "6 runs resnet20, fake, scratch" in text and "(stale)" in text
    (view,) = charts["by-bits"]["views"]
    lines = {trace["name"]: trace for trace in view["traces"]}
    assert set(lines) == {"full precision", "octav"}
    assert view["layout"]["xaxis"]["ticktext"] == ["4", "8"]
    assert ([round(x) for x in lines["octav"]["x"]], lines["octav"]["y"]) == ([0, 1], [63.0, 69.0])
    assert (lines["octav"]["error_y"]["array"], lines["octav"]["error_y"]["arrayminus"]) == ([2.0, 0.0], [3.0, 0.0])
    assert lines["full precision"]["y"] == [70.0, 70.0]
    assert [view["layout"]["xaxis"]["title"]["text"] for view in charts["by-cost"]["views"]] == [
        "time (minutes)",
        "size (MB)",
    ]
    assert {trace["name"] for trace in charts["curves"]["views"][0]["traces"]} == {
        "full precision",
        "octav",
        "max, ste",
    }
    where = text.partition("Config differences Keys")[2]
    for key in ("clipping.name", "gradient.name", "weight_bits", "seed"):
        assert key in where
    assert "epochs" not in where


def test_what_plays_no_part_is_no_difference(tmp_path: Path) -> None:
    """Such as quantization keys beside full precision; a key that only some runs of a method have is a difference."""
    runs = [make_run(tmp_path, words) for words in ("bits=32", "bits=4", "bits=8")]
    differing, values = compare_page._differing(entries(runs)[0])
    assert differing == ["weight_bits", "activation_bits"] and len(values) == 3
    runs.append(make_run(tmp_path, "bits=4", "recipe.batchnorm_batches=5"))
    assert compare_page._differing(entries(runs)[0])[0] == ["weight_bits", "activation_bits", "batchnorm_batches"]


def test_compare_keeps_networks_apart(tmp_path: Path) -> None:
    for model in ("resnet20", "resnet32"):
        for bits in (4, 8):
            make_run(tmp_path, f"bits={bits}", f"model={model}")
    charts = charts_of(compare_page.write([tmp_path], tmp_path / "compare.html"))
    names = [view["label"] for view in charts["by-bits"]["views"]]
    assert names == ["resnet20, fake, scratch", "resnet32, fake, scratch"]
    assert [view["label"] for view in charts["by-cost"]["views"]] == 2 * names


def test_no_more_than_seeds_are_averaged(tmp_path: Path) -> None:
    for seed, top1 in enumerate((60.0, 64.0)):
        make_run(tmp_path, f"seed={seed}", top1=top1)
        make_run(tmp_path, f"seed={seed}", "bits=8", top1=70.0)
    make_run(tmp_path, "lr=0.5", top1=10.0)
    make_run(tmp_path, "bits=32", top1=80.0)
    make_run(tmp_path, "bits=32", "lr=0.5", top1=20.0)
    page = compare_page.write([tmp_path], tmp_path / "compare.html")
    (view,) = charts_of(page)["by-bits"]["views"]
    lines = {trace["name"]: trace["y"] for trace in view["traces"]}
    assert lines == {
        "octav, lr=0.05": [62.0, 70.0],
        "octav, lr=0.5": [10.0],
        "full precision, lr=0.05": [80.0, 80.0],
        "full precision, lr=0.5": [20.0, 20.0],
    }
    assert "octav, lr=0.5" in text_of(page)


def test_compare_tells_runs_of_one_name_apart(tmp_path: Path) -> None:
    for place in ("here", "there"):
        make_run(tmp_path / place)
    text = text_of(compare_page.write([tmp_path / "here", tmp_path / "there"], tmp_path / "compare.html"))
    assert "here/resnet20_fake" in text and "there/resnet20_fake" in text


def test_a_damaged_neighbour_takes_nobody_s_page(tmp_path: Path) -> None:
    folder, other = make_run(tmp_path), make_run(tmp_path, "bits=32")
    (other / "summary.json").write_text("{")
    text = text_of(run_page.write(folder, tmp_path / "page.html"))
    assert "top1 60.00 %" in text and "against fp32" not in text


def test_what_cannot_be_read_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    make_run(runs), make_run(runs, "bits=32")
    bad = make_run(runs, name="bad")
    (bad / "config.yaml").write_text("schema_version: 99\n")
    line = "config.yaml: cannot be read (schema_version=99"
    assert line in text_of(compare_page.write([runs], tmp_path / "compare.html"))
    assert report(["status", str(runs)]) == 0
    assert "2 finished, 1 unreadable" in capsys.readouterr().out
    assert report(["table1", str(runs), "--out", str(tmp_path)]) == 0
    assert line in "".join(capsys.readouterr())
    assert report([str(bad)]) == 2
    assert line in capsys.readouterr().err
    assert report(["compare", str(bad)]) == 2
    assert line in capsys.readouterr().err
    assert report(["compare", str(bad), str(runs), "--out", str(tmp_path)]) == 0


def test_rows_that_were_cut_short_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path, top1=None)
    for name, row in (("metrics.csv", "3,1.0"), ("steps.csv", "3,7"), ("layers.csv", "3,conv1,wei")):
        with open(folder / name, "a") as file:
            file.write(row)
    page = run_page.write(folder, tmp_path / "page.html")
    assert "top1 so far 55.00 %" in text_of(page) and "after epoch 2" in text_of(page)
    assert charts_of(page)["accuracy"]["views"][0]["traces"][0]["x"] == [1, 2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: must be the folder of a run or one of compare, methods, results, ledger, table1"),
        (["runs"], "runs: is not a run; qat-report compare runs shows the runs in it"),
        (["empty"], "empty: holds no run of qat-run"),
        (["broken"], "broken/config.yaml: cannot be read"),
        (["compare", "runs"], "needs at least two runs, found 1"),
        (["compare", "runs", "empty"], "empty: holds no run of qat-run"),
        (["compare"], "needs at least two runs, found 1"),
        (["status", "runs", "empty"], "empty: is one folder too many; status takes only one"),
        (["runs/one", "runs"], "runs: is one folder too many; qat-report compare shows several runs"),
        (["figure1", "runs"], "runs: is one folder too many; figure1 takes none; select a run with --run"),
        (["figure3", "runs"], "runs: is one folder too many; figure3 takes none\n"),
        (["figure4", "runs", "file"], "file: is a file, but figure4 takes only folders of runs"),
        (["table1", "runs", "empty"], "empty: holds no run of qat-run"),
        (["runs/one", "--out", "file"], "file: File exists"),
        (["compare", "nope"], "nope: no such folder"),
        (["comapre", "runs"], "status; did you mean compare?"),
    ],
)
def test_wrong_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs"), name="one")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("a: [")
    Path("file").touch()
    assert report(args) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


# In a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome to render the pages")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def _with_a_choice(run: Path) -> Path:
    costs = {"mean bits of weights": 4.125, "mean bits of activations": 4.0, "MB": 0.0412, "GBitOPs": 0.0845}
    points = [ALLOCATED["chosen"] | {"costs": costs, "rise": 0.0123, "width": bits, "value": 60.0} for bits in (3, 4)]
    record = ALLOCATED | {"chosen": points[0], "uniform": points, "front": points, "measured": points}
    (run / "allocation.json").write_text(json.dumps(record))
    return run


@pytest.fixture(scope="module")
def pages(real: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by kind: a real run, an unfinished run, a run with a bit allocation, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / "runs", f"bits={bits}", top1=50.0 + bits) for bits in (4, 8, 10, 32)]
    runs.append(make_run(folder / "runs", "bits=8", "seed=1", top1=59.0))  # so that there are means over seeds
    unfinished = make_run(folder / "other", "clipping=max", top1=None)
    (unfinished / "histograms.json").unlink()
    return {
        "run": run_page.write(real, folder / "run.html"),
        "unfinished": run_page.write(unfinished, folder / "unfinished.html"),
        "chosen": run_page.write(_with_a_choice(make_run(folder / "chosen")), folder / "chosen.html"),
        "compare": compare_page.write([*runs, unfinished], folder / "compare.html"),
    }


TRACES = """
[...document.querySelectorAll('.chart')].map(chart => chart.querySelectorAll(
  '.main-svg .scatterlayer .trace, .main-svg .barlayer .trace').length)
"""


@pytest.mark.parametrize(
    ("kind", "width", "scheme"),
    [
        *(("run", 360, "dark"), ("run", 1280, "light")),
        *(("compare", 360, "dark"), ("compare", 1280, "light"), ("unfinished", 360, "light"), ("chosen", 360, "light")),
    ],
)
def test_pages_are_shown(page: Page, pages: dict[str, Path], kind: str, width: int, scheme: str) -> None:
    page.open(pages[kind], width, scheme=scheme)
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("data:", "blob:"))] == [pages[kind].as_uri()]
    traces = page.run(TRACES)
    assert len(traces) == len(charts_of(pages[kind])) and all(traces)
    assert page.run("innerWidth") == width
    assert page.run("document.documentElement.scrollWidth") == width  # no horizontal overflow
    assert page.run("[...document.querySelectorAll('.chart .main-svg')].every(e => e.clientWidth <= innerWidth)")
    heights = page.run("[...document.querySelectorAll('#methods tr, #costs tr')].map(e => e.offsetHeight)")
    assert bool(heights) == (kind in ("compare", "chosen")) and max(heights, default=0) < 150  # no squeezed columns
    back = page.run("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_selectors_redraw(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["run"])
    title = "document.querySelector('#histogram .xtitle').textContent"
    before = page.run(title)
    choose = "(() => { const s = document.getElementById('tensor'); s.selectedIndex = s.options.length - 1; {} })()"
    page.run(choose.replace("{}", "s.dispatchEvent(new Event('change'));"))
    assert page.run(title) != before
    kind = "document.getElementById('histogram').layout.yaxis.type"
    assert page.run(kind) == "log"
    page.run("document.getElementById('logarithmic').click()")
    assert page.run(kind) == "linear"
    assert page.complaints == []


def test_charts_follow_the_scheme_and_the_printer(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["run"], scheme="light")
    ink = "document.getElementById('accuracy').layout.font.color"
    light = page.run(ink)
    page.prefer("dark")
    dark = page.run(f"new Promise(done => setTimeout(() => done({ink}), 100))")
    assert light != dark
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run(ink) == light
    widths = page.run("[...document.querySelectorAll('.chart .main-svg')].map(e => e.clientWidth)")
    assert max(widths) <= 680
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(ink) == dark
    assert page.complaints == []


def test_the_config_table_shows_all_when_asked_and_the_command_is_copied(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["run"])
    rows = "[...document.querySelectorAll('#settings tr')].filter(e => e.offsetHeight).length"
    few = page.run(rows)
    page.run("document.querySelector('[data-toggle]').click()")
    assert page.run(rows) > few + 50
    page.run("document.querySelector('[data-copy]').click()")
    assert page.run("new Promise(done => setTimeout(() => done(getSelection().toString()), 100))").startswith(
        "qat-run "
    )
    assert page.complaints == []


def test_tables_are_sorted_by_number_both_ways(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["compare"])
    head = "[...document.querySelectorAll('#runs th')].find(e => e.textContent.startsWith({}))"
    cells = "[...document.querySelectorAll('#runs tbody tr')].map(e => e.cells[{}].textContent)"

    def sort(name: str) -> tuple[list[str], str]:
        place = head.format(json.dumps(name))
        page.run(f"{place}.querySelector('button').click()")
        return page.run(cells.format(page.run(f"{place}.cellIndex"))), page.run(f"{place}.getAttribute('aria-sort')")

    assert sort("bits") == (["4", "4", "8", "8", "10", "32"], "ascending")
    assert sort("bits") == (["32", "10", "8", "8", "4", "4"], "descending")
    assert sort("top1") == (["54.00", "58.00", "59.00", "60.00", "82.00", ""], "ascending")
    assert sort("top1") == (["82.00", "60.00", "59.00", "58.00", "54.00", ""], "descending")  # empty stays last
    assert sort("method")[0][0] == "full precision"
    assert page.run("document.querySelectorAll('#runs [aria-sort]').length") == 1


def test_nothing_is_cut_on_paper(page: Page, pages: dict[str, Path]) -> None:
    for kind in ("run", "compare"):
        page.open(pages[kind])
        page.run("dispatchEvent(new Event('beforeprint'))")
        page.prefer("dark", "print")
        wide = "Math.max(...[...document.querySelectorAll('table, figure, pre')].map(e => e.scrollWidth))"
        assert page.run(wide) <= 680
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.prefer("light")
