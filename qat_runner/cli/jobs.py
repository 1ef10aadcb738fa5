"""Rows of a sweep as jobs: processes or machines that one of Hydra's launchers gives each of them."""

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
"""Seconds that a job which was told to end waits to be killed, at most."""
_OF_SLURM = ("slurm", "submitit_slurm")
_OF_HYDRA = re.compile(r"\+{0,2}hydra\b")

log = logging.getLogger("qat_runner")


class Row(NamedTuple):
    """Of a request."""

    config: Config
    overrides: list[str]
    """that it was composed from"""


@dataclass
class Outcome:
    """What has come of the rows of a request, by their folders."""

    done: list[Path] = field(default_factory=list)
    """came to their end, now or earlier"""
    failures: list[QatError] = field(default_factory=list)
    """of the others"""
    left: list[Path] = field(default_factory=list)
    """have not begun, of those that are run here one after the other"""


def launch(launcher: str, overrides: Sequence[str], rows: Mapping[Path, Row], outcome: Outcome) -> None:
    """Give each row that is not finished yet to a launcher, and wait for all.

    Args:
        launcher: the option of hydra/launcher.
        overrides: of the whole sweep, with the launcher's settings.
        rows: by their folders.
        outcome: is added to.

    Raises:
        ConfigError: there is no such launcher's cluster here.
    """
    waiting = _unfinished(rows, outcome)
    if not waiting:
        return
    if launcher in _OF_SLURM and shutil.which("srun") is None:
        raise ConfigError(f"hydra/launcher={launcher}: there is no srun here, this is no machine of a Slurm cluster")
    with TemporaryDirectory() as scratch:
        # Jobs of submitit leave their logs where the sweep is; others leave nothing that anyone asked for.
        place = scratch if launcher == "joblib" else rows[waiting[0]].config.runs_dir
        try:
            jobs = [[word for word in rows[folder].overrides if not _OF_HYDRA.match(word)] for folder in waiting]
            results = _results([*overrides, f"hydra.sweep.dir={quoted(place)}"], jobs)
            for folder, result in zip(waiting, results, strict=True):
                try:
                    _ = result.return_value
                    outcome.done.append(folder)
                except Exception as error:
                    outcome.failures.append(_told(error))
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # whatever a cluster's launcher makes of a job that is gone
            outcome.failures.append(_told(error))


def _unfinished(rows: Mapping[Path, Row], outcome: Outcome) -> list[Path]:
    """Rows that are worth a job."""
    from qat_runner.experiment import finished

    found: list[Path] = []
    for folder, row in rows.items():
        try:
            (found if finished(row.config, folder) is None else outcome.done).append(folder)
        except QatError as error:
            outcome.failures.append(error)
    return found


def _results(overrides: Sequence[str], jobs: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
    """What came of jobs, which are started as Hydra's sweeper does, that would take all rows of a sweep."""
    with shipped_configs():
        config, loader = composed_launcher(overrides)
        context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
        row: TaskFunction = partial(_elsewhere, request=uuid4().hex)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=row, config=config)
        return launcher.launch(jobs, initial_job_idx=0)


def _told(error: Exception) -> QatError:
    if isinstance(error, QatError):
        return error
    return RunError(f"a job broke off: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


def _elsewhere(composed: DictConfig, request: str) -> float:
    """A row of a request, in a process or on a machine that Hydra's launcher gave it.

    Args:
        composed: the config, as Hydra composes it.
        request: a name for all its jobs, by which one that is put back into the queue knows what it has begun.
    """
    from qat_runner.experiment import run_after_others
    from qat_runner.runs.environment import LAUNCHED
    from qat_runner.runs.records import score

    os.environ[LAUNCHED] = request
    with on_terminal():
        try:
            return score(run_after_others(from_hydra(composed)))
        except StoppedError as error:  # no result: whoever stopped the job may start it again
            wait_for_slurm(error)
            sys.exit(error.exit_code)


def wait_for_slurm(error: QatError) -> None:
    """Let a job that Slurm ends be killed by it: one that ends itself before is not put back into the queue."""
    if isinstance(error, StoppedError) and "SLURM_JOB_ID" in os.environ and error.exit_code == 128 + signal.SIGTERM:
        log.info(f"{error}; waiting for Slurm to end the job")
        time.sleep(SLURM_PATIENCE)
