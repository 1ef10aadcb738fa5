"""Writes the results of a run to its folder as they arrive, and passes them to its trackers."""

import logging
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_runner.errors import one_line
from qat_runner.insertion import LayerNoise
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import LAYERS, METRICS, OSCILLATIONS, STEPS
from qat_runner.runs.trackers import TRACKERS, Tracked, Tracker

log = logging.getLogger("qat_runner")

LAYER_FIGURES = ("sqnr_db", "max_sqnr_db", "mse", "clipped_fraction", "s")
"""The figures of each tensor that trackers receive."""


class Record:
    """Writes to the folder of a run. Rows are on disk as soon as the method that adds them returns.

    Args:
        run: the run; its folder is created if needed. Rows after the point from which the run resumes, left by a
            process that was killed, are dropped.
        step: completed steps of the next epoch.
        trackers: names in TRACKERS.
    """

    def __init__(self, run: Tracked, step: int = 0, trackers: Sequence[str] = ()) -> None:
        self.folder = folder = run.folder
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).checkpoints.mkdir(exist_ok=True)

        def done(row: Mapping[str, Any]) -> bool:
            epoch = run.epoch
            return bool(row["epoch"] <= epoch) or (row["epoch"] == epoch + 1 and bool(0 < row.get("step", 0) <= step))

        for file in (METRICS, STEPS, LAYERS, OSCILLATIONS):
            if bad := file.keep(folder, done):
                log.warning(f"{folder / file.name}: {bad} damaged lines were dropped")
        self._trackers: dict[str, Tracker] = {}
        for name in trackers:
            with self._survived(name):
                self._trackers[name] = TRACKERS[name](run)

    def close(self, result: Mapping[str, Any] | None = None) -> None:
        """End the record with the result of the run, or with None if it failed. A second call does nothing."""
        for name, tracker in self._now().items():
            with self._survived(name):
                tracker.finish(result)
            self._trackers.pop(name, None)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Add a row to metrics.csv; its keys, which must be the same each time, are the columns."""
        METRICS.append(self.folder, [row], list(row))
        figures = {_tag(key): value for key, value in row.items() if key != "epoch" and math.isfinite(value)}
        for name, tracker in self._now().items():
            with self._survived(name):
                tracker.epoch(int(row["epoch"]), figures)

    def steps(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Add the steps of an epoch to steps.csv."""
        STEPS.append(self.folder, rows)

    def oscillations(self, epoch: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the oscillations of an epoch to oscillations.csv, one row per weight."""
        OSCILLATIONS.append(self.folder, ({"epoch": epoch, **row} for row in rows))

    def layers(self, epoch: int, noise: Sequence[LayerNoise], scalars: Mapping[str, Tensor]) -> None:
        """Add the noise of all tensors to layers.csv; trackers also get their clipping scalars [any shape], by name."""
        LAYERS.append(self.folder, [{"epoch": epoch, **asdict(row)} for row in noise])
        if not self._trackers:
            return
        figures = {key: {f"{row.layer}.{row.tensor}": getattr(row, key) for row in noise} for key in LAYER_FIGURES}
        finite = {key: {t: v for t, v in values.items() if math.isfinite(v)} for key, values in figures.items()}
        known = {name: s for name, s in scalars.items() if torch.isfinite(s).all()}
        for name, tracker in self._now().items():
            with self._survived(name):
                tracker.layers(epoch, finite, known)

    def _now(self) -> dict[str, Tracker]:
        return dict(self._trackers)

    @contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        """While open, an exception of a tracker is logged and ends only that tracker."""
        try:
            yield
        except Exception as error:  # a library or a network may raise anything
            if (tracker := self._trackers.pop(name, None)) is not None:
                with suppress(Exception):
                    tracker.finish(None)
            log.warning(
                f"tracker {name}: gave up ({_describe_with_place(error)}); the run's own files are still written"
            )


def _describe_with_place(error: Exception) -> str:
    """Describe the exception of a tracker: type, message, and the line of the tracker's own file that caused it."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    lines = [(file, line) for file, line in lines if file != __file__]
    file, line = next((place for place in reversed(lines) if place[0] == lines[0][0]), (__file__, 0))
    reason = one_line(error)
    return ", ".join([f"{type(error).__name__}: {reason}" if reason else type(error).__name__, f"{file}:{line}"])


def _tag(key: str) -> str:
    """Return the tracker tag of a column: train_loss -> train/loss, lr -> run/lr."""
    split, _, what = key.partition("_")
    return f"{split}/{what}" if split in ("train", "val") else f"run/{key}"


class NullRecord(Record):
    """Writes nothing: for processes other than the main one, which keeps the record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self, result: Mapping[str, Any] | None = None) -> None: ...

    def epoch(self, row: Mapping[str, float]) -> None: ...

    def steps(self, rows: Iterable[Mapping[str, float]]) -> None: ...

    def oscillations(self, epoch: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def layers(self, epoch: int, noise: Sequence[LayerNoise], scalars: Mapping[str, Tensor]) -> None: ...
