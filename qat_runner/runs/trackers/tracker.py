"""The interface of trackers, which show the figures of a run in addition to the run's own record."""

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
    """What a tracker knows about the run that starts or resumes."""

    name: str
    """name of the run"""
    folder: Path
    """folder of the run, in which a tracker may keep its own files"""
    config: Mapping[str, Any]
    """the resolved config, nested, as plain values: the content of config.yaml, which may be sent"""
    epoch: int = -1
    """the last recorded epoch, after which the run resumes; -1 if the run starts"""

    def known_as(self, tracker: str) -> str | None:
        """Return the id that a tracker gave this run when it started; None if the run starts now or no id was noted."""
        if self.epoch < 0:
            return None
        found = self._ids().get(tracker)
        return found if isinstance(found, str) else None

    def remember(self, tracker: str, run: str) -> None:
        """Note the id that a tracker gives this run, so that it stays the same run after an interruption."""
        write_text(RunFolder(self.folder).trackers, json.dumps(self._ids() | {tracker: run}, indent=1) + "\n")

    def _ids(self) -> dict[str, Any]:
        try:
            found = json.loads(RunFolder(self.folder).trackers.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class Tracker:
    """Base class of trackers. One is created when a run starts or resumes, only in the main process.

    An exception of a tracker is logged in one sentence and ends the tracking, but not the run, whose record is in its
    own files. A tracker must not import its library before it is created.
    """

    package: ClassVar[str | None] = None
    """import name of the library that it needs"""
    extra: ClassVar[str | None] = None
    """the extra of qat_runner that installs the library"""

    @classmethod
    def missing(cls) -> str | None:
        """Return why the tracker is not available here, as part of a sentence; None if it is."""
        if cls.package is None or find_spec(cls.package) is not None:
            return None
        hint = f"; pip install 'qat_runner[{cls.extra}]' installs it" if cls.extra else ""
        return f"{cls.package} is not installed{hint}"

    def __init__(self, run: Tracked) -> None:
        self.run = run

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        """Receive the finite figures of an epoch by tag, such as train/loss, val/top1, run/lr."""

    def layers(self, number: int, figures: Mapping[str, Mapping[str, float]], scalars: Mapping[str, Tensor]) -> None:
        """Receive the noise of all tensors after an epoch.

        Args:
            number: the epoch; 0 is before any training.
            figures: name of a figure, such as sqnr_db -> name of a tensor -> its finite value.
            scalars: name of a tensor -> its clipping scalars, any shape, finite.
        """

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """End the tracking with the content of summary.json, or with None if the run failed or was interrupted."""


class NullTracker(Tracker):
    """Shows nothing: `trackers=[none]`."""
