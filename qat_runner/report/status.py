"""What has become of the runs of a folder: finished, running, stale, failed or missing."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from qat_runner.config import load_config
from qat_runner.config.allowed import LONGEST_NAME
from qat_runner.errors import UnreadableError, told
from qat_runner.report.tables import accuracy, metric
from qat_runner.training.files import open_own, write_text
from qat_runner.training.lock import alive
from qat_runner.training.records import ASKED, ERROR, METRICS, SUMMARY

STATES = ("finished", "running", "stale", "failed", "missing", "unreadable")
"""stale: unfinished, and no process is at work on it; missing: asked for, and never begun; unreadable: what it left."""


@dataclass(frozen=True)
class Status:
    """What has become of one run."""

    name: str
    state: str
    epochs: str = ""
    """done and in all"""
    result: str = ""
    note: str = ""
    """of one that failed or cannot be read: why"""


def remember_asked(folders: Iterable[Path]) -> list[Path]:
    """Add run folders to the lists of the folders that they lie in; returns the folders made for it, deepest last.

    Raises:
        UnreadableError: there is a list, which is none of ours.
    """
    made: list[Path] = []
    for folder in [folder for folder in folders if folder.name not in asked(folder.parent)]:
        made += [path for path in reversed(folder.parents) if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open_own(folder.parent / ASKED.name, "a") as file:  # at the end: sweeps side by side do so as well
            file.write(_lines([folder.name]))
    return made


def forget_asked(folders: Iterable[Path], made: Sequence[Path]) -> None:
    """Take run folders off the lists that do not exist, since their runs were refused, and what is empty then away.

    Raises:
        UnreadableError: a list is none of ours.
    """
    for folder in folders:
        known = asked(folder.parent)
        if folder.name in known and not folder.exists():
            path = folder.parent / ASKED.name
            write_text(path, _lines(name for name in known if name != folder.name))
            if known == [folder.name]:
                path.unlink()
    for path in reversed(made):
        with suppress(OSError):  # it holds more
            path.rmdir()


def _lines(names: Iterable[str]) -> str:
    """A line for each name, which may be of another encoding than the terminal's."""
    return "".join(f"{os.fsencode(name).decode(errors='backslashreplace')}\n" for name in names)


def asked(runs_dir: Path) -> list[str]:
    """Names of all run folders in a folder that sweeps asked for, as they were asked for.

    Raises:
        UnreadableError: their list is none of ours.
    """
    names = [os.fsdecode(name.encode()) for name in (ASKED.read(runs_dir) or "").splitlines() if name]
    for name in names:
        if "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > LONGEST_NAME:
            raise UnreadableError(f"{runs_dir / ASKED.name}: cannot be read ({told(name)}: is no name of a folder)")
    return names


def statuses(runs_dir: Path) -> list[Status]:
    """Of every run in a folder of runs, and of those that were asked for, by name."""
    names, unreadable = {path.parent.name for path in runs_dir.glob("*/config.yaml")}, []
    try:
        names |= {*asked(runs_dir)}
    except UnreadableError as error:
        unreadable.append(Status(ASKED.name, "unreadable", note=str(error)))
    return [*(status(runs_dir / name) for name in sorted(names)), *unreadable]


def status(folder: Path) -> Status:
    """Of the run in a folder."""
    try:
        return _status(folder)
    except UnreadableError as error:
        return Status(folder.name, "unreadable", note=str(error))


def _status(folder: Path) -> Status:
    config = load_config(folder)
    if config is None:
        return Status(folder.name, "running" if alive(folder) else "missing")
    rows = METRICS.read(folder)
    epochs = f"{rows[-1]['epoch'] if rows else 0:.0f}/{config.epochs}" if config.training else ""
    summary = SUMMARY.read(folder)
    if summary is not None:
        return Status(folder.name, "finished", epochs, f"{metric(summary)} {accuracy(summary):.2f} %")
    if alive(folder):
        return Status(folder.name, "running", epochs)
    why = ERROR.read(folder)
    if why is not None:
        return Status(folder.name, "failed", epochs, note=told(next(iter(why.splitlines()), "")))
    return Status(folder.name, "stale", epochs)


def text(found: list[Status]) -> str:
    """A table, and the number of each state."""
    rows = [(s.name, s.state, s.epochs, s.result, s.note) for s in found]
    counts = ", ".join(f"{n} {state}" for state in STATES if (n := sum(s.state == state for s in found)))
    table = tabulate(rows, ("run", "state", "epochs", "result", "why"), maxcolwidths=[None, None, None, None, 70])
    return f"{table}\n\n{counts or 'no runs'}"
