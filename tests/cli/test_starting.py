"""Imports before the first output of a command: PyTorch takes seconds, and most messages do not need it."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qat_runner.cli.run import main as qat_run

WORDS = {
    "antlr4",
    "hydra",
    "omegaconf",
    "packaging",
    "pydantic",
    "tqdm",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
PARTS = {"annotated_types", "hydra_plugins", "pydantic_core", "qat_runner"}
"""Parts of these packages, and the package itself."""
PAGES = {"jinja2", "markupsafe", "tabulate", "wcwidth"}

SCRIPT = """
import json, sys
from qat_runner import cli
sys.argv = sys.argv[1:]
try:
    code = getattr(cli, sys.argv[0].replace("-", "_"))()
except SystemExit as stop:  # argparse raises it
    code = stop.code or 0
names = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(json.dumps([code, sorted(name for name in names if not name.startswith(("_sysconfig", "_cython", "cython")))]))
"""


def carried_out(*command: str) -> tuple[int, set[str], str]:
    """Return the exit code of a command, the packages that it imported, and its output on standard error."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, check=True)
    code, packages = json.loads(done.stdout.splitlines()[-1])
    return code, set(packages) - started(), done.stderr


@functools.cache
def started() -> set[str]:
    """Return the packages that Python itself imports at start, such as hooks of editable installations."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(*{name.partition('.')[0] for name in sys.modules})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (("qat-run", "--help"), WORDS),
        (("qat-run", "--cfg", "job"), WORDS),
        (("qat-export", "--help"), {"tqdm"}),
        (("qat-bits", "--help"), WORDS),
        (("qat-report", "--help"), WORDS | PAGES),
    ],
)
def test_output_that_does_not_need_pytorch(command: tuple[str, ...], allowed: set[str]) -> None:
    code, packages, _ = carried_out(*command)
    assert code == 0 and packages <= allowed | PARTS


@pytest.mark.parametrize(
    "request_",
    [
        ("bits=99",),
        ("modell=resnet20",),
        ("clipping=octave",),
        ("weight_format=float",),
        ("-m", "bits=4,99"),
        ("rules=[{match: a, bit: 3}]",),
        ("policy=/nowhere.yaml",),
    ],
)
def test_invalid_configs_are_rejected_before_pytorch_is_imported(request_: tuple[str, ...]) -> None:
    code, packages, said = carried_out("qat-run", *request_)
    assert code == 2 and said.startswith("qat-run: ")
    assert packages <= WORDS | PARTS


def test_a_missing_folder_is_reported_before_imports_that_only_runs_need(tmp_path: Path) -> None:
    code, packages, said = carried_out("qat-run", "model=resnet18", "dataset=imagenet", f"data_dir={tmp_path}")
    assert code == 2 and said.startswith("qat-run: dataset=imagenet: not found")
    assert "torch" in packages
    assert not packages & {"matplotlib", "pandas", "scipy", "tensorboard", "torchvision", "transformers", "triton"}


def test_the_html_report_of_a_run_does_not_need_pytorch(tmp_path: Path) -> None:
    tiny = ("model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=16", "batch_size=8")
    assert qat_run([*tiny, "epochs=1", f"run_dir={tmp_path / 'run'}"]) == 0
    code, packages, _ = carried_out("qat-report", str(tmp_path / "run"))
    assert code == 0 and (tmp_path / "run" / "report.html").is_file()
    assert packages <= WORDS | PARTS | PAGES
