"""The environment in which a run is started: versions, git state, command and machine."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from qat_runner import ranks
from qat_runner.runs.records import Git, Session

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


def environment() -> Session:
    """Return versions, git state, command and machine, for environment.json."""
    cuda = torch.cuda.is_available()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": os.getcwd(),
        "job": job(),
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
        "processes": ranks.world_size(),
    }


LAUNCHED = "QAT_RUNNER_JOB"
"""Environment variable with the job name that a sweep's launcher sets: one name for all jobs of a command."""


def job() -> str | None:
    """Return the name of the job that this process belongs to; None if there is none."""
    return os.environ.get(LAUNCHED) or os.environ.get("SLURM_JOB_ID")


def put_back() -> bool:
    """Return whether this process may belong to a job that ran before and was requeued."""
    return bool(os.environ.get(LAUNCHED)) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


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
    """Return the git state of the checkout that this code runs from; None if it is installed from a wheel."""

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
