"""What a tracker is: where the figures of a run are shown as well, beside the run's own record."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qat_runner.runs.files import write_text
from qat_runner.runs.folder import RunFolder


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of the run that begins or goes on."""

    name: str
    """of the run"""
    folder: Path
    """of the run, in which a tracker may keep files of its own"""
    config: Mapping[str, Any]
    """the resolved config, nested, in plain values: what config.yaml holds, and all of the run that may be sent"""
    epoch: int = -1
    """the last epoch that is on record: the run goes on after it; -1: it begins"""

    def known_as(self, tracker: str) -> str | None:
        """What a tracker called this run when it began; None: it has not, or has left no note."""
        if self.epoch < 0:
            return None
        found = self._ids().get(tracker)
        return found if isinstance(found, str) else None

    def remember(self, tracker: str, run: str) -> None:
        """Note what a tracker calls this run, so that it is the same one after the run was interrupted."""
        write_text(RunFolder(self.folder).trackers, json.dumps(self._ids() | {tracker: run}, indent=1) + "\n")

    def _ids(self) -> dict[str, Any]:
        try:
            found = json.loads(RunFolder(self.folder).trackers.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class Tracker:
    """Shows the figures of a run. It is made when a run begins or goes on, in its main process alone.

    Whatever it raises is told in a sentence, and ends the tracking, not the run: the run's own files are its record.
    Its library is imported when it is made, not before.
    """

    package: ClassVar[str | None] = None
    """the library that it takes, as Python imports it"""
    extra: ClassVar[str | None] = None
    """the extra of qat_runner that brings it"""

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be had here, in half a sentence; None: it can."""
        if cls.package is None or find_spec(cls.package) is not None:
            return None
        brings = f"; pip install 'qat_runner[{cls.extra}]' brings it" if cls.extra else ""
        return f"{cls.package} is not installed{brings}"

    def __init__(self, run: Tracked) -> None:
        self.run = run

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        """The finite figures of an epoch by tag, such as train/loss, val/top1, run/lr."""

    def layers(self, number: int, figures: Mapping[str, Mapping[str, float]], scalars: Mapping[str, Tensor]) -> None:
        """The noise of all tensors after an epoch (0: before any).

        Args:
            number: the epoch.
            figures: name of a figure, such as sqnr_db -> name of a tensor -> its finite value.
            scalars: name of a tensor -> its clipping scalars, any shape, finite.
        """

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The run is over, with what summary.json holds; None: it broke off or was interrupted, and may go on."""


class NullTracker(Tracker):
    """Shows nothing: `trackers=[none]`."""
