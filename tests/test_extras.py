"""Installations without some of the extras: the library works, and commands say which extra to install."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qat_runner import cli

ROOT = Path(__file__).resolve().parents[1]
BROUGHT_BY_TORCH = {"jinja2", "typing_extensions"}
ONNX = {"onnx", "onnxruntime", "onnxscript"}
ABSENT = sorted({*cli._OF_EXTRAS, *ONNX} - BROUGHT_BY_TORCH)
IMPORTED_AS = {"hydra-core": "hydra", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}

BLOCK = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, *args)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def without(absent: list[str], code: str, *args: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    warnings = ["-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning"]  # by torch, if NumPy is missing
    command = [sys.executable, *warnings, "-c", BLOCK.format(absent=absent) + code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("part", ["model", "quant"])
def test_the_library_needs_no_extras(tmp_path: Path, part: str) -> None:
    code = {
        "quant": """
import torch
from qat_runner.quant import Octav, Quantizer, fake_quantize, octav
x = torch.randn(8, 3, 3, 3, requires_grad=True)
fake_quantize(x, octav(x, 4, dim=0), 4, gradient="mad").sum().backward()
Quantizer(4, Octav())(x)
""",
        "model": """
import torch
from torch import nn
from qat_runner import calibrate, freeze, noise_report, quantize_model
from qat_runner.insertion import remove_quantizers, summary
from qat_runner.quant.kernels import set_backend
set_backend("eager")
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
x = torch.randn(2, 3, 8, 8)
quantize_model(model, bits=4, example=x)
model(x).sum().backward()
print(summary(model), noise_report(model, [x]))
calibrate(model, [x])
freeze(model, "averaged", [x])
remove_quantizers(model)
""",
    }[part]
    done = without(ABSENT, code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "absent", "message"),
    [
        ("qat_run --help", ABSENT, "qat-run: hydra is not installed; pip install 'qat_runner[run]' installs it"),
        (
            "qat_report runs",
            ABSENT,
            "qat-report: tqdm is not installed; pip install 'qat_runner[report]' installs it",
        ),
        ("qat_export run", ABSENT, "qat-export: tqdm is not installed; pip install 'qat_runner[export]' installs it"),
        (
            "qat_run",
            ["tensorboard"],
            "qat-run: trackers=tensorboard: tensorboard is not installed; pip install 'qat_runner[run]' installs it",
        ),
        (
            "qat_report .",
            ["jinja2"],
            "qat-report: jinja2 is not installed; pip install 'qat_runner[report]' installs it",
        ),
        (
            "qat_run dataset=squad model=bert model.checkpoint=bert data_dir=.",
            ["transformers"],
            "qat-run: transformers is not installed; pip install 'qat_runner[text]' installs it",
        ),
    ],
)
def test_commands_say_which_extra_is_missing(tmp_path: Path, command: str, absent: list[str], message: str) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").touch()
    name, *args = command.split()
    done = without(absent, f"from qat_runner.cli import {name}; sys.exit({name}())", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_vision_networks_are_trained_without_the_other_extras(tmp_path: Path) -> None:
    absent = ["transformers", *ONNX]
    args = ["model=resnet20", "backend=eager", "epochs=1", "limit_train_batches=1", "limit_val_batches=1"]
    done = without(absent, "from qat_runner.cli import qat_run; sys.exit(qat_run())", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_package_that_commands_need_is_assigned_to_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("run", "report", "text"):
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]
            package = IMPORTED_AS.get(name, name).replace("-", "_")
            if package != "qat_runner":
                assert cli._OF_EXTRAS[package] == (None if extra == "run" else extra)
