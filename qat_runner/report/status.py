"""What has become of the runs of a folder: finished, running, stale, failed or missing."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from qat_runner.config import Config, load_config
from qat_runner.errors import UnreadableError
from qat_runner.report.tables import accuracy, metric
from qat_runner.training.lock import alive
from qat_runner.training.tracking import read_json, read_rows

ASKED = "asked.txt"
"""In a folder of runs: names of all run folders that sweeps asked for."""

STATES = ("finished", "running", "stale", "failed", "missing", "unreadable")
"""stale: unfinished, and no process is at work on it; missing: asked for, and never begun; unreadable: its config."""


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
    """Add run folders to the lists of the folders that they lie in; returns the folders made for it, deepest last."""
    made: list[Path] = []
    for folder in folders:
        made += [path for path in reversed(folder.parents) if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.parent / ASKED
        if folder.name not in _asked(path):  # added at the end, since sweeps side by side do so as well
            _write_asked(path, [folder.name], "a")
    return made


def forget_asked(folders: Iterable[Path], made: Sequence[Path]) -> None:
    """Take run folders off the lists that do not exist, since their runs were refused, and what is empty then away."""
    for folder in folders:
        path = folder.parent / ASKED
        known = _asked(path)
        if folder.name in known and not folder.exists():
            _write_asked(path, [name for name in known if name != folder.name], "w")
            if known == [folder.name]:
                path.unlink()
    for path in reversed(made):
        with suppress(OSError):  # it holds more
            path.rmdir()


def _asked(path: Path) -> list[str]:
    """Names that are not UTF-8 keep their bytes."""
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.is_file() else []


def _write_asked(path: Path, names: Iterable[str], mode: str) -> None:
    with open(path, mode, encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{name}\n" for name in names)


def statuses(runs_dir: Path) -> list[Status]:
    """Of every run in a folder of runs, and of those that were asked for, by name."""
    names = {path.parent.name for path in runs_dir.glob("*/config.yaml")} | {*_asked(runs_dir / ASKED)}
    return [status(runs_dir / name) for name in sorted(names)]


def status(folder: Path) -> Status:
    """Of the run in a folder."""
    try:
        config = load_config(folder)
    except UnreadableError as error:
        return Status(folder.name, "unreadable", note=str(error))
    if config is None:
        return Status(folder.name, "running" if alive(folder) else "missing")
    epochs = _epochs(folder, config)
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json")
        return Status(folder.name, "finished", epochs, f"{metric(summary)} {accuracy(summary):.2f} %")
    if alive(folder):
        return Status(folder.name, "running", epochs)
    why = folder / "error.txt"
    if why.is_file():
        return Status(folder.name, "failed", epochs, note=next(iter(why.read_text(encoding="utf-8").splitlines()), ""))
    return Status(folder.name, "stale", epochs)


def _epochs(folder: Path, config: Config) -> str:
    rows = read_rows(folder / "metrics.csv")
    return f"{rows[-1]['epoch'] if rows else 0}/{config.epochs}" if config.training else ""


def text(found: list[Status]) -> str:
    """A table, and the number of each state."""
    rows = [(s.name, s.state, s.epochs, s.result, s.note) for s in found]
    counts = ", ".join(f"{n} {state}" for state in STATES if (n := sum(s.state == state for s in found)))
    table = tabulate(rows, ("run", "state", "epochs", "result", "why"), maxcolwidths=[None, None, None, None, 70])
    return f"{table}\n\n{counts or 'no runs'}"
