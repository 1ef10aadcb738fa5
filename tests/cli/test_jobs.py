"""Rows as jobs of a launcher, and detached commands: which are started, and with which arguments."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from qat_runner import experiment
from qat_runner.cli import run as cli_run
from qat_runner.config import Config
from qat_runner.errors import BusyError, ConfigError
from qat_runner.runs.environment import LAUNCHED
from tests.cli.commands import Run, run_in

SMALL = ["backend=eager", "model=resnet8", "dataset=fake", "dataset.image_size=8", "epochs=1"]


class Launcher:
    """A launcher in place of a cluster: it composes rows as Hydra's launchers do, and runs them one after the other."""

    def __init__(self) -> None:
        self.jobs: list[list[str]] = []
        self.settings: list[dict[str, Any]] = []

    def __call__(self, plugins: Plugins, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> Any:
        def launch(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
            self.settings.append({**config.hydra.launcher, "dir": config.hydra.sweep.dir})
            return [done(list(overrides)) for overrides in job_overrides]

        def done(overrides: list[str]) -> Any:
            self.jobs.append(overrides)
            composed = hydra_context.config_loader.load_sweep_config(config, overrides)
            with open_dict(composed):
                del composed["hydra"]
            try:
                return SimpleNamespace(return_value=task_function(composed))
            except Exception as error:
                return Failed(error)

        return SimpleNamespace(launch=launch)


class Failed:
    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def return_value(self) -> float:
        raise self.error


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(LAUNCHED, "")  # restores it after a job has changed it
    return run_in(tmp_path, monkeypatch, SMALL)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    made = Launcher()
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *args, **kwargs: made(*args, **kwargs))
    return made


@pytest.fixture
def carried_out(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Return the list of configs that jobs ran. Seed 1 is finished, seed 2 cannot be resumed, seed 3 is busy."""
    configs: list[Config] = []

    def carry_out(config: Config) -> dict[str, Any]:
        configs.append(config)
        if config.seed == 3:
            raise BusyError("seed 3 is busy")
        return {"metric": "top1", "top1": 0.0}

    def finished(config: Config, folder: Path) -> dict[str, Any] | None:
        if config.seed == 2:
            raise ConfigError("seed 2 is trained to its end")
        return {} if config.seed == 1 else None

    monkeypatch.setattr(experiment, "run_after_others", carry_out)
    monkeypatch.setattr(experiment, "finished", finished)
    return configs


def test_a_job_for_each_run_that_is_not_finished(
    run: Run, launcher: Launcher, carried_out: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "overwrite=true"]
    assert run("-m", *slurm, "bits=32", "clipping=octav,max", "seed=0,1,2,3") == 2
    text = capsys.readouterr().err
    assert text.count("seed 2 is trained to its end") == 1 and text.count("seed 3 is busy") == 1
    labelled = [(config.clipping.name, config.seed) for config in carried_out]
    assert labelled == [("octav", 0), ("octav", 3)]  # in full precision, clipping has no effect
    assert all(config.overwrite for config in carried_out)
    assert not any(re.match("hydra", word) for job in launcher.jobs for word in job)
    (settings,) = launcher.settings
    assert settings["partition"] == "gpu" and settings["dir"] == "runs"
    launcher.jobs.clear()
    assert run("-m", "hydra/launcher=slurm", "seed=1") == 0 and not launcher.jobs  # no run is left to do


def test_rows_of_an_experiment_as_jobs(run: Run, launcher: Launcher, carried_out: list[Config]) -> None:
    words = ["+experiment=table1", "+stand_in=digits", "model=resnet8", "seed=0"]
    assert run("-m", "hydra/launcher=joblib", *words) == 0
    assert len(launcher.jobs) == len(carried_out) == 6
    assert len({config.clipping.name for config in carried_out}) > 1


def test_the_launcher_for_slurm_is_rejected_without_slurm(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("srun") is not None:
        pytest.skip("there is one here")
    assert run("-m", "hydra/launcher=slurm", "seed=0,1") == 2
    assert "hydra/launcher=slurm: needs a machine of a Slurm cluster" in capsys.readouterr().err
    assert not [*Path().iterdir()]


def test_more_than_one_process_per_row_is_rejected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", "hydra/launcher=slurm", "hydra.launcher.tasks_per_node=8") == 2
    text = capsys.readouterr().err
    assert "hydra.launcher.tasks_per_node=8: must be 1, since a row is one process; to use several" in text


def test_a_detached_command_has_the_arguments_that_were_typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are filled in, such as the list of preprocessing keys that were typed, are not valid in a command."""
    started: list[list[str]] = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **kwargs: started.append(command) or SimpleNamespace(pid=1)
    )
    assert run("-m", "dataset.image_size=16,8", "--detach", "data_dir=~/data") == 0
    (command,) = started
    child = command[command.index("qat_runner") + 1 :]
    assert child == ["-m", *SMALL, "dataset.image_size=16,8", "data_dir=~/data"]
    rows: list[int] = []
    monkeypatch.setattr(cli_run, "_run_all", lambda args, found, outcome: rows.append(len(found)))
    assert cli_run.main(child) == 0 and rows == [2]
