"""Writes the figures of a run into its folder, as they come."""

import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from qat_runner.insertion import LayerNoise
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import LAYERS, METRICS, STEPS

log = logging.getLogger("qat_runner")


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
        RunFolder(folder).checkpoints.mkdir(exist_ok=True)

        def done(row: Mapping[str, Any]) -> bool:
            return bool(row["epoch"] <= epoch) or (row["epoch"] == epoch + 1 and bool(0 < row.get("step", 0) <= step))

        for file in (METRICS, STEPS, LAYERS):
            if bad := file.keep(folder, done):
                log.warning(f"{folder / file.name}: {bad} damaged lines are left out")
        self._hook, threading.excepthook = threading.excepthook, _quiet_about_tensorboard
        self._board = SummaryWriter(str(RunFolder(folder).tensorboard), purge_step=epoch + 1)

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


class NullRecord(Record):
    """Writes nothing: for a process that is not the one to keep the record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None: ...

    def epoch(self, row: Mapping[str, float]) -> None: ...

    def steps(self, rows: Iterable[Mapping[str, float]]) -> None: ...

    def layers(self, epoch: int, noise: Sequence[LayerNoise], scalars: Mapping[str, Tensor]) -> None: ...
