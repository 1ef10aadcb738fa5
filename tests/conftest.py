"""Shared fixtures. Parallel tests use one thread each; no test sees the user's data, jobs or trackers."""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from qat_runner.config import Config

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes, and those that they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")

Compose = Callable[..., "Config"]

gc.disable()


def pytest_collection_finish() -> None:
    """Exempt everything imported and collected from garbage collection: scanning it took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def composed() -> Compose:
    """Return a function that composes the config from the overrides of a command."""
    from qat_runner.config import from_hydra
    from qat_runner.config.composing import compose_config

    return lambda *overrides: from_hydra(compose_config(overrides))


@pytest.fixture(scope="session", autouse=True)
def _called() -> Iterator[None]:
    """Set the command that a run records, which would be a path of pytest otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qat-run"])
        yield


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in os.environ:
        if name.startswith(("QAT_DATA_DIR", "SLURM_", "WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _backend_left_alone() -> Iterator[None]:
    """Reset the backend, which a run sets for its process, to auto for the next test."""
    yield
    kernels = sys.modules.get("qat_runner.quant.kernels")
    if kernels is not None and kernels._asked != "auto":
        kernels.set_backend("auto")


@pytest.fixture(autouse=True)
def _logger_left_alone() -> Iterator[None]:
    """Check that no command leaves its handlers behind: they would write to the closed stdout of an earlier test."""
    log = logging.getLogger("qat_runner")
    before = list(log.handlers), log.propagate, log.level
    yield
    assert (log.handlers, log.propagate, log.level) == before


@pytest.fixture(autouse=True)
def _few_plots(
    request: pytest.FixtureRequest, _logger_left_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # after the logger, which a test may have patched as well
    """Draw plots only in tests with the mark `plots`, since this takes a third of the time of a small run."""
    if "plots" in request.keywords:
        return
    from qat_runner.training import plots  # imports PyTorch and matplotlib

    def drawn(folder: Path, file: str, rows: str) -> None:
        if (folder / rows).is_file():
            (folder / file).write_bytes(b"\x89PNG")

    monkeypatch.setattr(plots, "plot_curves", lambda folder, task: drawn(folder, "curves.png", "metrics.csv"))
    monkeypatch.setattr(plots, "plot_noise", lambda folder: drawn(folder, "noise.png", "layers.csv"))
