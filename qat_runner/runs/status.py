"""The states of the runs in a folder: finished, running, stale, failed, missing or unreadable."""

from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from qat_runner.config import CONFIG_FILE, load_config
from qat_runner.errors import ConfigError, UnreadableError, one_line
from qat_runner.runs.lock import alive
from qat_runner.runs.records import ASKED, ERROR, METRICS, SUMMARY, measured, metric, score
from qat_runner.runs.requested_runs import requested

STATES = {
    "finished": "",
    "running": "a process is carrying it out",
    "stale": "no process is carrying it out; the same command resumes it",
    "failed": "it ended with an error",
    "missing": "requested by a sweep, but not started",
    "unreadable": "its files cannot be read",
}
"""The states, and what each means."""


@dataclass(frozen=True)
class Status:
    """The state of one run."""

    name: str
    state: str
    epochs: str = ""
    """completed and total epochs"""
    result: str = ""
    note: str = ""
    """reason of a failed or unreadable run; for other unfinished runs, the meaning of the state"""


def statuses(runs_dir: Path) -> list[Status]:
    """Return the status of every run in a folder and of all requested ones, by name; for a run folder, of that run.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not runs_dir.is_dir():
        raise ConfigError(f"{runs_dir}: no such folder of runs")
    if (runs_dir / CONFIG_FILE).is_file():
        return [status(runs_dir)]
    names, unreadable = {path.parent.name for path in runs_dir.glob(f"*/{CONFIG_FILE}")}, []
    try:
        names |= {*requested(runs_dir)}
    except UnreadableError as error:
        unreadable.append(Status(ASKED.name, "unreadable", note=str(error)))
    return [*(status(runs_dir / name) for name in sorted(names)), *unreadable]


def status(folder: Path) -> Status:
    """Return the status of the run in a folder."""
    try:
        return _status(folder)
    except UnreadableError as error:
        return Status(folder.name, "unreadable", note=str(error))


def _status(folder: Path) -> Status:
    config = load_config(folder)
    if config is None:
        return _unfinished(folder, "running" if alive(folder) else "missing")
    rows = METRICS.read(folder)
    epochs = f"{rows[-1]['epoch'] if rows else 0:.0f}/{config.epochs}" if config.training else ""
    summary = SUMMARY.read(folder)
    if summary is not None:
        return Status(
            folder.name, "finished", epochs, f"{metric(summary)} {measured(summary).describe(score(summary))}"
        )
    if alive(folder):
        return _unfinished(folder, "running", epochs)
    why = ERROR.read(folder)
    if why is not None:
        return Status(folder.name, "failed", epochs, note=one_line(next(iter(why.splitlines()), "")))
    return _unfinished(folder, "stale", epochs)


def _unfinished(folder: Path, state: str, epochs: str = "") -> Status:
    return Status(folder.name, state, epochs, note=STATES[state])


def text(found: list[Status]) -> str:
    """Return a table of the runs, and the number of runs in each state."""
    rows = [(s.name, s.state, s.epochs, s.result, s.note) for s in found]
    counts = ", ".join(f"{n} {state}" for state in STATES if (n := sum(s.state == state for s in found)))
    table = tabulate(rows, ("run", "state", "epochs", "result", "why"), maxcolwidths=[None, None, None, None, 70])
    return f"{table}\n\n{counts or 'no runs'}"
