"""TensorBoard: event files in the run folder."""

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qat_runner.runs.folder import RunFolder
from qat_runner.runs.trackers.tracker import Tracked, Tracker


class TensorBoard(Tracker):
    """Writes figures as scalars and clipping scalars as histograms. Repeated epochs of a killed run are shown once."""

    package, extra = "tensorboard", "run"

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run)
        self._hook, threading.excepthook = threading.excepthook, _quiet_about_tensorboard
        self._board = SummaryWriter(str(RunFolder(run.folder).tensorboard), purge_step=run.epoch + 1)

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        for tag, value in figures.items():
            self._board.add_scalar(tag, value, number)
        self._board.flush()

    def layers(self, number: int, figures: Mapping[str, Mapping[str, float]], scalars: Mapping[str, Tensor]) -> None:
        for key, values in figures.items():
            for tensor, value in values.items():
                self._board.add_scalar(f"layers_{key}/{tensor}", value, number)
        for name, s in scalars.items():
            self._board.add_histogram(f"clipping_scalars/{name}", s.float().cpu(), number)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook


def _quiet_about_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Suppress tracebacks of TensorBoard's writer thread, whose error the next call raises and the run logs."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
