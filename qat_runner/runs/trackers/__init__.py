"""Trackers, one per file: they show the figures of a run in addition to the run's own record."""

from qat_runner.plugins import Registry
from qat_runner.runs.trackers.ml_flow import MLflow
from qat_runner.runs.trackers.tensorboard import TensorBoard
from qat_runner.runs.trackers.tracker import NullTracker, Tracked, Tracker
from qat_runner.runs.trackers.weights_and_biases import WeightsAndBiases

__all__ = ["TRACKERS", "Tracked", "Tracker"]

TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker",
    "qat_runner.trackers",
    {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow, "none": NullTracker},
    valid=lambda kind: isinstance(kind, type) and issubclass(kind, Tracker),
)
"""The trackers, by the names that the key `trackers` accepts."""
