"""The record of a run: its folder, and what is written there as it goes.

| file              | what                                                                                          |
|-------------------|-----------------------------------------------------------------------------------------------|
| config.yaml       | the resolved config                                                                           |
| environment.json  | versions, git state, command, machine                                                         |
| quantizers.txt    | table of the quantized tensors                                                                |
| log.txt           | what was said on the terminal                                                                 |
| metrics.csv       | a row an epoch                                                                                |
| steps.csv         | a row a training step                                                                         |
| layers.csv        | noise of each quantized tensor, a block an epoch; epoch 0 is before any training              |
| tensorboard/      | the figures of metrics.csv and layers.csv, and histograms of the scalars                      |
| checkpoints/      | last.pt, previous.pt (the one before it) and best.pt                                          |
| histograms.json   | how the values of each quantized tensor lie on its grid, at the end                           |
| curves.png, noise.png | plots                                                                                     |
| report.html       | the run's page, where qat-report was asked for it                                             |
| predictions.json  | the answers of the latest validation, in SQuAD's format (question answering only)             |
| error.txt         | why the run broke off, if it did                                                              |
| summary.json      | the result; a folder that has it is a finished run                                            |
"""

import logging
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from qat_runner import distributed
from qat_runner.insertion import LayerNoise
from qat_runner.training.records import LAYERS, METRICS, STEPS, Git, Sitting

log = logging.getLogger("qat_runner")

RECORDED = (
    *("config.yaml", "environment.json", "quantizers.txt", "log.txt", "metrics.csv", "steps.csv", "layers.csv"),
    *("histograms.json", "tensorboard", "checkpoints", "curves.png", "noise.png", "predictions.json", "summary.json"),
    *("error.txt", "report.html", "export"),
)
"""All that a run folder holds."""

_PACKAGES = (
    "qat_runner",
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "hydra-core",
    "omegaconf",
    "tensorboard",
    "scikit-learn",
    "safetensors",
)


class Record:
    """Writes the folder of a run. Rows are on disk as soon as their method returns.

    Args:
        folder: the run's folder, made if need be.
        epoch: the epoch that the run goes on from; rows of later ones, left by a run that was killed, are dropped.
        step: steps of the next epoch that are done.
    """

    def __init__(self, folder: Path, epoch: int = -1, step: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)

        def done(row: Mapping[str, Any]) -> bool:
            return bool(row["epoch"] <= epoch) or (row["epoch"] == epoch + 1 and bool(0 < row.get("step", 0) <= step))

        for file in (METRICS, STEPS, LAYERS):
            if bad := file.keep(folder, done):
                log.warning(f"{folder / file.name}: {bad} damaged lines are left out")
        self._hook, threading.excepthook = threading.excepthook, _quiet_about_tensorboard
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def close(self) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook

    def epoch(self, row: Mapping[str, float]) -> None:
        """Add a row to metrics.csv; the keys, the same each time, are its columns."""
        METRICS.append(self.folder, [row], list(row))
        for key, value in row.items():
            if key != "epoch" and math.isfinite(value):
                half, _, what = key.partition("_")
                tag = f"{half}/{what}" if half in ("train", "val") else f"run/{key}"
                self._board.add_scalar(tag, value, int(row["epoch"]))
        self._board.flush()

    def steps(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Add the steps of an epoch to steps.csv."""
        STEPS.append(self.folder, rows)

    def layers(self, epoch: int, noise: Sequence[LayerNoise], scalars: Mapping[str, Tensor]) -> None:
        """Add the noise of all tensors to layers.csv, and the scalars [any shape], by tensor name, to TensorBoard."""
        LAYERS.append(self.folder, [{"epoch": epoch, **asdict(row)} for row in noise])
        for row in noise:
            for key in ("sqnr_db", "max_sqnr_db", "mse", "clipped_fraction", "s"):
                value = getattr(row, key)
                if math.isfinite(value):
                    self._board.add_scalar(f"layers_{key}/{row.layer}.{row.tensor}", value, epoch)
        for name, s in scalars.items():
            if torch.isfinite(s).all():
                self._board.add_histogram(f"clipping_scalars/{name}", s.float().cpu(), epoch)


def _quiet_about_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Its writer's thread tells the next call of its error, which we tell in a sentence; that is enough."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


class Silence(Record):
    """The record of a process that is not the one to keep it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None: ...

    def epoch(self, row: Mapping[str, float]) -> None: ...

    def steps(self, rows: Iterable[Mapping[str, float]]) -> None: ...

    def layers(self, epoch: int, noise: Sequence[LayerNoise], scalars: Mapping[str, Tensor]) -> None: ...


def environment() -> Sitting:
    """Versions, git state, command and machine, for environment.json."""
    cuda = torch.cuda.is_available()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": os.getcwd(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
            "cuda": torch.version.cuda,
        },
        "processes": distributed.world_size(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git() -> Git | None:
    """Commit and cleanness of the checkout that this code runs from; None where it is installed from a wheel."""

    def ask(*words: str) -> str:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True)
        return done.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        return {
            "commit": ask("rev-parse", "HEAD"),
            "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(ask("status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
