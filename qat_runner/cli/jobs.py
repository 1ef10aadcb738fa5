"""Running the rows of a sweep as jobs, in processes or on machines provided by one of Hydra's launchers."""

import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from uuid import uuid4

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qat_runner.cli.terminal import on_terminal
from qat_runner.config import Config, from_hydra
from qat_runner.config.composing import composed_launcher, quoted, shipped_configs
from qat_runner.errors import ConfigError, QatError, RunError, StoppedError

SLURM_PATIENCE = 600.0
"""Maximum seconds that a job which Slurm asked to end waits to be killed."""
_OF_SLURM = ("slurm", "submitit_slurm")
_OF_HYDRA = re.compile(r"\+{0,2}hydra\b")

log = logging.getLogger("qat_runner")


class Row(NamedTuple):
    """A row of a sweep, or a single run."""

    config: Config
    overrides: list[str]
    """the overrides that the config was composed from"""


@dataclass
class Outcome:
    """The outcome of the rows of a command, by their folders."""

    done: list[Path] = field(default_factory=list)
    """rows that are finished, now or earlier"""
    failures: list[QatError] = field(default_factory=list)
    """errors of the other rows"""
    left: list[Path] = field(default_factory=list)
    """rows that have not started, if they are run in this process one after the other"""


def launch(launcher: str, overrides: Sequence[str], rows: Mapping[Path, Row], outcome: Outcome) -> None:
    """Pass each unfinished row to a launcher, and wait for all of them.

    Args:
        launcher: the option of hydra/launcher.
        overrides: the overrides of the whole sweep, with the launcher's settings.
        rows: run folder -> row.
        outcome: the outcome, which is updated.

    Raises:
        ConfigError: this machine is not part of the launcher's cluster.
    """
    waiting = _unfinished(rows, outcome)
    if not waiting:
        return
    if launcher in _OF_SLURM and shutil.which("srun") is None:
        raise ConfigError(f"hydra/launcher={launcher}: needs a machine of a Slurm cluster, but srun is not found")
    with TemporaryDirectory() as scratch:
        # Jobs of submitit write their logs to the folder of the sweep; those of joblib leave nothing useful there.
        place = scratch if launcher == "joblib" else rows[waiting[0]].config.runs_dir
        try:
            jobs = [[word for word in rows[folder].overrides if not _OF_HYDRA.match(word)] for folder in waiting]
            results = _results([*overrides, f"hydra.sweep.dir={quoted(place)}"], jobs)
            for folder, result in zip(waiting, results, strict=True):
                try:
                    _ = result.return_value
                    outcome.done.append(folder)
                except Exception as error:
                    outcome.failures.append(_describe(error))
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # the launcher of a cluster may raise anything about a lost job
            outcome.failures.append(_describe(error))


def _unfinished(rows: Mapping[Path, Row], outcome: Outcome) -> list[Path]:
    """Return the folders of rows that are not finished, and record the others in the outcome."""
    from qat_runner.experiment import finished

    found: list[Path] = []
    for folder, row in rows.items():
        try:
            (found if finished(row.config, folder) is None else outcome.done).append(folder)
        except QatError as error:
            outcome.failures.append(error)
    return found


def _results(overrides: Sequence[str], jobs: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
    """Run jobs and return their results. They are started in the same way as by Hydra's sweeper, which itself would run
    all rows of a sweep."""
    with shipped_configs():
        config, loader = composed_launcher(overrides)
        context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
        row: TaskFunction = partial(_elsewhere, request=uuid4().hex)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=row, config=config)
        return launcher.launch(jobs, initial_job_idx=0)


def _describe(error: Exception) -> QatError:
    if isinstance(error, QatError):
        return error
    return RunError(f"a job failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


def _elsewhere(composed: DictConfig, request: str) -> float:
    """Run a row in a process or on a machine that Hydra's launcher provides.

    Args:
        composed: the config composed by Hydra.
        request: an identifier shared by all jobs of the command, by which a requeued job recognizes its own runs.
    """
    from qat_runner.experiment import run_after_others
    from qat_runner.runs.environment import LAUNCHED
    from qat_runner.runs.records import score

    os.environ[LAUNCHED] = request
    with on_terminal():
        try:
            return score(run_after_others(from_hydra(composed)))
        except StoppedError as error:  # there is no result: the job may be started again
            wait_for_slurm(error)
            sys.exit(error.exit_code)


def wait_for_slurm(error: QatError) -> None:
    """Let Slurm kill a job that it asked to end, since a job that exits by itself is not requeued."""
    if isinstance(error, StoppedError) and "SLURM_JOB_ID" in os.environ and error.exit_code == 128 + signal.SIGTERM:
        log.info(f"{error}; waiting for Slurm to end the job")
        time.sleep(SLURM_PATIENCE)
