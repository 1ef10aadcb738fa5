"""MLflow: a local store in the run folder, or the one that the environment variable MLFLOW_TRACKING_URI sets."""

import os
import time
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qat_runner.config import flat
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.trackers.tracker import Tracked, Tracker

NAME = "mlflow"
EXPERIMENT = "qat_runner"
"""The default experiment; the environment variable MLFLOW_EXPERIMENT_NAME overrides it."""
LONGEST_VALUE = 500
"""Maximum length of a parameter value, because some stores accept no longer ones."""


class MLflow(Tracker):
    """Logs the config as parameters and the figures as metrics per epoch; a resumed run stays the same MLflow run."""

    package, extra = "mlflow", "mlflow"

    def __init__(self, run: Tracked) -> None:
        super().__init__(run)
        with warnings.catch_warnings():  # about MLflow's plans for its file store
            warnings.simplefilter("ignore")
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            from mlflow import MlflowClient

            here = RunFolder(run.folder.resolve()).mlruns.as_uri()
            self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", here))
            self._id = run.known_as(NAME) or self._begin()
            self._client.set_terminated(self._id, "RUNNING")
        run.remember(NAME, self._id)

    def _begin(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        identifier = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        begun = self._client.create_run(identifier, run_name=self.run.name)
        for key, value in flat(self.run.config).items():
            self._client.log_param(begun.info.run_id, key, str(value)[:LONGEST_VALUE])
        return str(begun.info.run_id)

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self._log(number, figures)

    def layers(self, number: int, figures: Mapping[str, Mapping[str, float]], scalars: Mapping[str, Tensor]) -> None:
        for key, values in figures.items():
            self._log(number, {f"layers_{key}/{tensor}": value for tensor, value in values.items()})

    def finish(self, result: Mapping[str, Any] | None) -> None:
        for key, value in (result or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._client.log_metric(self._id, f"result/{key}", value)
        self._client.set_terminated(self._id, "KILLED" if result is None else "FINISHED")

    def _log(self, number: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now, most = int(1000 * time.time()), 1000  # metrics per call
        metrics = [Metric(key, value, now, number) for key, value in figures.items()]
        for start in range(0, len(metrics), most):
            self._client.log_batch(self._id, metrics[start : start + most])
