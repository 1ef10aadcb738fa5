"""What README and docs show works: shell and Python blocks, examples, links, the configuration reference, the site.

The comment on the line before a block of shell commands says how the block is tested:

    <!-- shell: run -->              it is run, in an initially empty folder that all such blocks of a page share
    <!-- shell: check -->            it would be accepted if the data, weights and checkpoints that it names existed
    <!-- shell: not run, REASON -->  it is not tested
"""

import inspect
import json
import pkgutil
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from torch import nn

import qat_runner
from qat_runner.cli import bits, export, report, run
from qat_runner.data import DATASETS, Dataset, prepare
from qat_runner.data.image_readers import image_reader
from qat_runner.data.images import MemorySource
from qat_runner.errors import ConfigError
from qat_runner.experiment import checks
from qat_runner.models import MODELS
from qat_runner.paper.tables import make_table
from qat_runner.quant import METHODS, Call, ClippingMethod, IntFormat, clipping_method
from qat_runner.report.results import read_results
from qat_runner.tasks import language_modelling, question_answering

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "qat-run": run.main,
    "qat-report": report.main,
    "qat-bits": bits.main,
    "qat-export": export.main,
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found, lines = [], page.read_text().splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a block is not closed"
    indented = [line for line in lines if re.match(r"\s+```|\s*~~~", line)]
    assert not indented, f"{page}: blocks are fenced by ``` at the start of a line, or they are not seen here"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        mark = re.fullmatch(r"<!-- shell: (.+) -->", lines[start - 1])
        text = "\n".join(lines[start + 1 : end])
        found.append(Block(page, start + 1, lines[start][3:], mark[1] if mark else "", text))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console")]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands(block: Block) -> list[str]:
    """Return the commands of a block, one per line, with continuation lines joined and without comment lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_shell_block_says_how_it_is_tested(block: Block) -> None:
    assert block.mark in ("run", "check") or re.match(r"not run, \w", block.mark), (
        f"{block}: the line before must be <!-- shell: run -->, check or not run, REASON"
    )


RUN = dict.fromkeys(block.page for block in SHELL if block.mark == "run")
LONG = ("export.md",)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else []) for page in RUN],
    ids=lambda page: page.name,
)
def test_shell_blocks_run(page: Path, place: Path) -> None:
    for block in (block for block in SHELL if block.page == page and block.mark == "run"):
        for command in commands(block):
            name, *words = shlex.split(command, comments=True)
            if name in MAINS:
                assert MAINS[name](words) == 0, f"{block}: {command}"
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)


def marked(block: Block) -> Any:
    """Return the block as a parameter; commands that made results have many rows, and are slow to check."""
    return pytest.param(block, marks=[pytest.mark.slow] if block.page.parent.name == "results" else [])


@pytest.mark.parametrize("block", [marked(block) for block in SHELL if block.mark == "check"], ids=str)
def test_shell_blocks_would_be_accepted(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(block):
        check(command, monkeypatch)


WRONG = [
    *("qat-run bitz=4", "qat-run clipping=octave", "qat-run bits=1", "qat-run -m seed=0,1 mode=training --detach"),
    *("qat-run bits=4 clipping.qq=1 --cfg job", "qat-run dataset=imagenet model=bert data_dir=/data"),
    *("qat-run dataset=imagenet mode=retrain weights=file.txt.gz bits=99", "qat-run -m +experiment=table9"),
    *("torchrun --nproc-per-node 8 -m qat_runner modle=resnet50", "make tests", "rm -rf runs"),
    *("qat-report table9", "qat-report table1 runs --modle resnet50", "qat-report runs/NAME runs/OTHER"),
    *("qat-report figure3 runs", "qat-report", "qat-export runs/NAME --rule averaged"),
    *("python -m qat_runner.data.prepare cifar11 /data", "qat-export"),
    *("qat-bits weights=baseline", "qat-bits weights=baseline budget=4 max_drop=1"),
]


@pytest.mark.parametrize("command", WRONG)
def test_misspelt_commands_would_not_be_accepted(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check(command, monkeypatch)


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the command would be accepted, given the data and weights that it names."""
    match shlex.split(command.replace("--cfg job", ""), comments=True):
        case ["qat-run", *words]:
            _check_run(words, monkeypatch)
        case ["qat-bits", *words]:
            _check_run(["mode=allocate", *words], monkeypatch)
        case ["torchrun", *words] if "qat_runner" in words:
            _check_run(words[words.index("qat_runner") + 1 :], monkeypatch)
        case ["qat-report", *words]:
            _check_report(words, monkeypatch)
        case ["qat-export", *words]:
            assert _parses(export.main, words, monkeypatch), command
        case ["python", "-m", "qat_runner.data.prepare", *words]:
            assert _parses(prepare.main, words, monkeypatch), command
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        case _:
            raise AssertionError(f"{command}: cannot be checked; its block can be run, or say why not")


def _check_run(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call qat-run until it would begin: rows are composed and checked as if all that they name existed."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "BasicSweeper", SimpleNamespace(split_arguments=_few_rows))
        patch.setattr(checks, "find_dataset", _but_for("not found in data_dir=", checks.find_dataset))
        patch.setattr(checks, "_check_weights", _but_for(": no such file", checks._check_weights))
        patch.setattr(
            question_answering, "read_checkpoint", lambda checkpoint: SimpleNamespace(max_position_embeddings=512)
        )
        patch.setattr(language_modelling, "read_decoder", lambda checkpoint: SimpleNamespace())
        for begin in ("_run_all", "_detach", "record_requested"):
            patch.setattr(run, begin, lambda *args: 0)
        assert run.main(words) == 0, words


def _check_report(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call qat-report until it would read runs; a word with one slash is created as the folder of a run."""
    for word in words:
        if re.fullmatch(r"\w+/\w+", word):
            Path(word).mkdir(parents=True, exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(report, "_report", lambda args: [])
        try:
            code = report.main(words)
        except SystemExit as end:
            raise AssertionError(words) from end
        assert code == 0, words


def _few_rows(overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
    """Return enough rows of a sweep for every value to occur, each time adding the row with the most new values."""
    rows = BasicSweeper.split_arguments(overrides, max_batch_size)[0]
    few, missing = [], {value for row in rows for value in row}
    while missing or not few:
        few.append(max(rows, key=lambda row: len(missing.intersection(row))))
        missing.difference_update(few[-1])
    return [few]


def _but_for(absence: str, checker: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checker that ignores errors about an absence, given by a part of their message."""

    def tolerant(*args: Any, **kwargs: Any) -> Any:
        try:
            return checker(*args, **kwargs)
        except ConfigError as error:
            if absence not in str(error):
                raise
            return None

    return tolerant


class _ParsedError(Exception):
    pass


def _parses(main: Callable[[Sequence[str]], int], words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a command can parse its arguments, without carrying it out."""
    original = ArgumentParser.parse_args

    def parse(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise _ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse)
        try:
            main(words)
        except _ParsedError:
            return True
        except SystemExit:
            return False
    raise AssertionError("the command has parsed nothing")


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, place: Path) -> None:
    if "runs/four/export" in block.text:  # the run of the page's shell block, in less time
        short = ("model=resnet8", "epochs=1", "limit_train_batches=1", "limit_val_batches=1", "run_dir=runs/four")
        assert run.main(short) == 0 and export.main(["runs/four", "--batches", "1", "--formats", "onnx"]) == 0
    exec(compile(block.text, str(block), "exec"), {})


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem == "torchao_observer":
        pytest.importorskip("torchao", reason="torchao is not installed; the example names the version that it needs")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def example() -> Iterator[type[ClippingMethod]]:
    """Return the clipping method of the docs, which registers itself."""
    yield runpy.run_path(str(DOCS / "examples" / "mean_multiple.py"))["MeanMultiple"]
    del METHODS["mean_multiple"]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["octav", "max", "percentile", "mse_sweep", "mean_multiple"])
def test_clipping_methods_keep_the_contract_of_the_docs(name: str, signed: bool, example: type[ClippingMethod]) -> None:
    method, format, call = clipping_method(name), IntFormat(4, signed), Call()
    x = torch.randn(6, 3, 2, 2)
    x[4] = 0
    whole, rows = (method.solve(x, format, dim, call) for dim in (None, 0))
    assert (whole.shape, rows.shape) == ((), (6, 1, 1, 1))
    assert rows[4] == 0 and bool((rows >= 0).all())
    assert method.solve(x[4], format, None, call) == 0
    with pytest.raises(ValueError, match="NaN or infinity"):
        method.solve(torch.tensor([1.0, torch.nan]), format, None, call)


def test_the_clipping_method_of_the_docs_by_its_name_in_configs(place: Path, example: type[ClippingMethod]) -> None:
    named = ("clipping=max", "clipping.name=mean_multiple")  # as a file with the line "name: mean_multiple" does
    small = ("model=resnet20", "epochs=1", "limit_train_batches=1", "run_dir=run")
    assert run.main([*named, "+clipping.options.multiple=-1", *small]) == 2
    assert run.main([*named, "+clipping.options.multiple=2.5", *small]) == 0
    clipping = yaml.safe_load((place / "run" / "config.yaml").read_text())["clipping"]
    assert (clipping["name"], clipping["options"]) == ("mean_multiple", {"multiple": 2.5})
    assert yaml.safe_load((place / "run" / "summary.json").read_text())["clipping"] == "mean_multiple"


def test_a_model_and_a_data_set_added_as_in_the_docs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10
    monkeypatch.setitem(MODELS, "mine", lambda classes, small, width: nn.Sequential(*_layers(classes)))
    read = image_reader(lambda folder, config: MemorySource(split, split, config.augment))
    mine = Dataset("classification", read, lambda folder: (folder / "mine.bin").is_file(), "mine.bin")
    monkeypatch.setitem(DATASETS, "mine", mine)
    command = ["model.name=mine", "dataset.name=mine", "data_dir=data", "epochs=1", "batch_size=20", "run_dir=run"]
    assert run.main(command) == 2  # the data do not exist
    (place / "data" / "mine").mkdir(parents=True)
    (place / "data" / "mine" / "mine.bin").touch()
    assert run.main(command) == 0
    assert yaml.safe_load((place / "run" / "summary.json").read_text())["dataset"] == "mine"


def _layers(classes: int) -> list[nn.Module]:
    return [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes)]


def test_the_configuration_reference_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))
    assert (DOCS / "configuration.md").read_text() == script["reference"](), "run: python scripts/config_reference.py"
    for _, prefix, cls, _ in script["SECTIONS"]:
        keys = [field.name for field in fields(cls) if not script["_is_section"](field)]
        assert [prefix + key for key in keys if key not in script["meanings"](cls)] == []


def test_the_api_page_has_all_exported_names() -> None:
    page = (DOCS / "api.md").read_text()
    shown = re.findall(r"^\.\. auto(?:function|class):: qat_runner\.(\w+)$", page, re.MULTILINE)
    assert sorted([*shown, "quantize_model"]) == qat_runner.__all__
    for place in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", page, re.MULTILINE):
        assert inspect.getdoc(pkgutil.resolve_name(place)), place


@pytest.mark.slow
def test_tables_of_results_match_their_runs() -> None:
    page, runs = (DOCS / "results" / "README.md").read_text(), read_results(DOCS / "results" / "runs.csv")
    for name in ("table1", "table2", "table3", "table4", "distillation"):
        lines = page[page.index(f"## {name}: ") :].split("\n\n")[1].splitlines()[2:]
        shown = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
        found = list(zip(*list(make_table(name, runs, "cifar10").columns.values())[:6], strict=True))
        assert [row for row in shown if row not in found] == [] and len(shown) > 2


def _anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_a_target(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_checkout_that_pages_name_exist(page: Path) -> None:
    said = re.findall(r"\b(?:tests|scripts|qat_runner)/[\w/]+\.py\b", page.read_text())
    gone = [path for path in said if not (ROOT / path).is_file()]
    assert gone == [] or page.name == "CHANGELOG.md"  # which also names removed files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
        check(f"make {target}", monkeypatch)


def test_the_import_order_in_the_docs_is_the_enforced_one() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    image = re.search(r"```text\n(.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)
    assert image is not None
    shown = re.findall(r"^(\w+) ", image[1], re.MULTILINE)
    assert shown == [room for room in layers if room != "__main__"]


def make_run() -> list[str]:
    """Return the commands of `make run`, as a user would type them."""
    recipe = re.search(r"^run:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    return re.findall(r"^\t\$\(BIN\)/(.+)$", recipe[1], re.MULTILINE)


def test_the_first_run_would_be_accepted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [command.split()[0] for command in make_run()] == ["qat-run", "qat-report"]
    Path("runs").mkdir()
    for command in make_run():
        check(command, monkeypatch)
        assert command in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_first_run_separates_the_methods(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full precision, OCTAV, max-scaling: in this order for each seed, and further apart than the seeds vary."""
    for command in make_run():
        name, *words = shlex.split(command)
        assert MAINS[name](words) == 0
    assert capsys.readouterr().out.endswith("report/compare.html\n")
    found = [json.loads(path.read_text()) for path in place.glob("runs/*/summary.json")]
    top1 = {(s["clipping"], s["seed"]): s["top1"] for s in found}
    seeds = sorted({s["seed"] for s in found})
    assert len(seeds) >= 3 and len(found) == 3 * len(seeds)
    for better, worse in (("none", "octav"), ("octav", "max")):
        differences = [top1[better, seed] - top1[worse, seed] for seed in seeds]
        assert min(differences) > 0
        assert statistics.fmean(differences) > 2 * statistics.stdev(differences) / len(seeds) ** 0.5


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install -e '.[docs]' has it")
    options = ["-b", "html", "-W", "-n", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "qat-run" in (tmp_path / "html" / "recipes.html").read_text()
