"""Rows of a sweep as jobs: processes or machines that one of Hydra's launchers gives each of them."""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from uuid import uuid4

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qat_runner.cli.terminal import on_terminal
from qat_runner.config import Config, from_hydra
from qat_runner.config.composing import composed_launcher, quoted, shipped_configs
from qat_runner.errors import QatError, RunError, StoppedError

SLURM_PATIENCE = 600.0
"""Seconds that a job which was told to end waits to be killed, at most."""
log = logging.getLogger("qat_runner")


class Row(NamedTuple):
    """Of a request."""

    config: Config
    overrides: list[str]
    """that it was composed from"""


def launch(launcher: str, overrides: Sequence[str], rows: Mapping[Path, Row], failures: list[QatError]) -> None:
    """Give each row that is not finished yet to a launcher, and wait for all; their errors are collected.

    Args:
        launcher: the option of hydra/launcher.
        overrides: of the whole sweep, with the launcher's settings.
        rows: by their folders.
    """
    waiting = _unfinished(rows, failures)
    if not waiting:
        return
    with TemporaryDirectory() as scratch:
        # Jobs of submitit leave their logs where the sweep is; others leave nothing that anyone asked for.
        place = scratch if launcher == "joblib" else waiting[0].config.runs_dir
        try:
            _launch([*overrides, f"hydra.sweep.dir={quoted(place)}"], waiting, failures)
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # whatever a cluster's launcher makes of a job that is gone
            failures.append(_told(error))


def _unfinished(rows: Mapping[Path, Row], failures: list[QatError]) -> list[Row]:
    """Rows that are worth a job."""
    from qat_runner.experiment import finished

    found = []
    for folder, row in rows.items():
        try:
            if finished(row.config, folder) is None:
                found.append(row)
        except QatError as error:
            failures.append(error)
    return found


def _launch(overrides: Sequence[str], rows: Sequence[Row], failures: list[QatError]) -> None:
    """As Hydra's sweeper does, which would take all rows of the sweep, whichever they are."""
    with shipped_configs():
        config, loader = composed_launcher(overrides)
        context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
        row: TaskFunction = partial(_elsewhere, request=uuid4().hex)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=row, config=config)
        jobs = [[word for word in row.overrides if not re.match(r"\+{0,2}hydra\b", word)] for row in rows]
        for done in launcher.launch(jobs, initial_job_idx=0):
            try:
                _ = done.return_value
            except Exception as error:
                failures.append(_told(error))


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
