"""Tests that a process finds what an installed package registers by its entry points, without importing it first."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from qat_runner.cli.run import main
from qat_runner.config import from_hydra, run_name
from qat_runner.config.composing import compose_config
from qat_runner.config.tasks import measure, metrics
from qat_runner.experiment import preflight
from tests.plugins.my_package.codebook import Codebook

HERE = Path(__file__).parent

ENTRY_POINTS = """
[qat_runner.clipping]
halved_maximum = my_package.halved_maximum:HalvedMaximum
learned_maximum = my_package.learned_maximum:LearnedMaximum

[qat_runner.gradients]
leaky = my_package.leaky:Leaky

[qat_runner.formats]
codebook = my_package.codebook:Codebook

[qat_runner.models]
small_network = my_package.small_network:small_network

[qat_runner.datasets]
stripes = my_package.stripes:DATASET
numbers = my_package.regression:NUMBERS

[qat_runner.tasks]
regression = my_package.regression:TASK

[qat_runner.trackers]
lines = my_package.lines:Lines

[qat_runner.configs]
my_package = my_package.configs
"""


def installed(place: Path, entry_points: str) -> dict[str, str]:
    """Return the environment of a process in which my_package is installed."""
    metadata = place / "my_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    (place / "my_package").symlink_to(HERE / "my_package")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])}


def ask(environment: dict[str, str], place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qat_runner", "device=cpu", "noise_batches=1", *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_one_of_each_in_a_sweep(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site", ENTRY_POINTS)
    clipping = "clipping=octav,halved_maximum,learned_maximum"
    done = ask(environment, tmp_path, "-m", "model=small_network", "dataset=stripes,numbers", clipping, "lr=0.01")
    assert done.returncode == 0, done.stderr
    runs = {folder.name.rpartition("_")[0]: folder for folder in (tmp_path / "runs").iterdir() if folder.is_dir()}
    assert len(runs) == 6
    folder = next(path for name, path in runs.items() if "stripes" in name and "halved_maximum" in name)
    assert json.loads((folder / "summary.json").read_text())["clipping"] == "halved_maximum"
    assert yaml.safe_load((folder / "config.yaml").read_text())["clipping"]["options"] == {"share": 0.7}
    learned = next(path for name, path in runs.items() if "stripes" in name and "learned_maximum" in name)
    assert "learned" in (learned / "quantizers.txt").read_text()
    numbers = next(path for name, path in runs.items() if "numbers" in name)
    assert json.loads((numbers / "summary.json").read_text())["metric"] == "rounded"


def test_a_format_an_estimator_a_tracker_and_options(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site", ENTRY_POINTS)
    words = ("model=small_network", "dataset=stripes", "format=codebook", "clipping=halved_maximum", "epochs=1")
    options = ("clipping.options.share=0.9", "gradient=leaky", "+gradient.options.leak=0.2")
    done = ask(environment, tmp_path, *words, *options, "run_dir=run", "trackers=[lines]")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["gradient"] == "leaky(leak=0.2)"
    assert (tmp_path / "run" / "lines.txt").read_text().startswith("1 ")
    tensors = json.loads((tmp_path / "run" / "histograms.json").read_text())
    assert next(t["levels"] for t in tensors if (t["layer"], t["tensor"]) == ("2", "weight")) == list(
        Codebook(4).levels
    )
    done = ask(environment, tmp_path, *words, "clipping.options.share=2", "run_dir=other")
    assert done.returncode == 2 and not (tmp_path / "other").exists()
    assert "clipping=halved_maximum: share=2: must be above 0 and at most 1" in done.stderr


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install my_package in this process; afterwards, forget the options that it added."""
    installed(tmp_path / "site", ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    groups = [ConfigStore.instance().repo.setdefault(name, {}) for name in ("clipping", "gradient", "model", "dataset")]
    before = [{*group} for group in groups]
    yield
    for group, names in zip(groups, before, strict=True):
        for name in {*group} - names:
            del group[name]


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("clipping=halved_maximun", "halved_maximum"),
        ("clipping.name=halved_maximun", "halved_maximum"),
        ("gradient=leeky", "leaky"),
        ("format=codebok", "codebook"),
        ("model=small_networks", "small_network"),
        ("dataset=stripe", "stripes"),
        ("trackers=[line]", "lines"),
    ],
)
def test_the_names_of_plugins_are_suggested(word: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=resnet8", "dataset=digits", word]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {suggestion}?\n")


BROKEN = {
    "clipping": ("clipping=broken", "clipping method 'broken': my_package.nowhere:X cannot be imported"),
    "gradients": ("gradient=broken", "gradient estimator 'broken': my_package.nowhere:X cannot be imported"),
    "formats": ("format=broken", "number format 'broken': my_package.nowhere:X cannot be imported"),
    "models": ("model=broken", "model 'broken': my_package.nowhere:X cannot be imported"),
    "datasets": ("dataset.name=broken", "data set 'broken': my_package.nowhere:X cannot be imported"),
    "tasks": ("dataset.task=broken", "task 'broken': my_package.nowhere:X cannot be imported"),
    "trackers": ("trackers=[broken]", "tracker 'broken': my_package.nowhere:X cannot be imported"),
}
"""Group of entry points -> the override that requests one of them, and the error if it cannot be imported."""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install an entry point of each group that cannot be imported, in this process."""
    points = "".join(f"[qat_runner.{group}]\nbroken = my_package.nowhere:X\n" for group in BROKEN)
    installed(tmp_path / "site", points)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    yield
    for group in ("clipping", "gradient", "model"):
        ConfigStore.instance().repo[group].pop("broken.yaml", None)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(("words", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told_in_a_sentence(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=resnet8", "dataset=digits", words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.usefixtures("broken")
def test_what_is_broken_is_nothing_to_who_does_not_ask_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = from_hydra(compose_config(["model=resnet8", "dataset=fake", "dataset.image_size=8", "trackers=[]"]))
    assert preflight(config).name == run_name(config)
    assert measure("perplexity").lower_is_better and measure("other").unit == "%" and "f1" in metrics()
    assert main(["model=resnet9", "dataset=digits"]) == 2
    assert "model=resnet9: must be one of " in capsys.readouterr().err
    assert main(["clipping=percentile", "clipping.sync=true"]) == 2
    assert "clipping 'percentile' cannot be synchronized over processes, only octav and max" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry_points", "words", "message"),
    [
        (
            "[qat_runner.clipping]\nbroken = my_package.stripes:DATASET\n",
            ("clipping=broken",),
            "'broken' is not a valid clipping method",
        ),
        ("[qat_runner.configs]\nbroken = my_package.nowhere\n", (), "configs of broken (my_package.nowhere) cannot be"),
    ],
)
def test_what_is_none_is_told_in_a_sentence(
    entry_points: str, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = ask(installed(tmp_path / "site", entry_points), tmp_path, "model=resnet8", "dataset=digits", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
