"""The list, in a folder of runs, of the run folders that sweeps asked for."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qat_runner.config.allowed import LONGEST_NAME
from qat_runner.errors import UnreadableError, told
from qat_runner.runs.files import open_own, write_text
from qat_runner.runs.lock import same_file
from qat_runner.runs.records import ASKED


def remember_asked(folders: Iterable[Path]) -> list[Path]:
    """Add run folders to the lists of the folders that they lie in; returns the folders made for it, deepest last.

    Raises:
        UnreadableError: there is a list, which is none of ours.
    """
    made: list[Path] = []
    for runs_dir, names in _by_place(folders).items():
        if {*names} <= {*asked(runs_dir)}:
            continue
        made += [path for path in reversed((runs_dir, *runs_dir.parents)) if not path.exists()]
        runs_dir.mkdir(parents=True, exist_ok=True)
        with _held(runs_dir) as file:
            known = {*asked(runs_dir)}
            file.write(_lines(name for name in names if name not in known))
    return made


def forget_asked(folders: Iterable[Path], made: Sequence[Path]) -> None:
    """Take run folders off the lists that do not exist, since their runs were refused, and what is empty then away.

    Raises:
        UnreadableError: a list is none of ours.
    """
    for runs_dir, names in _by_place(folders).items():
        gone = {name for name in names if not (runs_dir / name).exists()}
        if not gone & {*asked(runs_dir)}:
            continue
        with _held(runs_dir):
            left = [name for name in asked(runs_dir) if name not in gone]
            if left:
                write_text(runs_dir / ASKED.name, _lines(left))
            else:
                (runs_dir / ASKED.name).unlink()
    for path in reversed(made):
        with suppress(OSError):  # it holds more
            path.rmdir()


def _by_place(folders: Iterable[Path]) -> dict[Path, list[str]]:
    """The names of folders, by what they lie in."""
    found: dict[Path, dict[str, None]] = {}
    for folder in folders:
        found.setdefault(folder.parent, {})[folder.name] = None
    return {runs_dir: [*names] for runs_dir, names in found.items()}


@contextmanager
def _held(runs_dir: Path) -> Iterator[IO[str]]:
    """The list of a folder of runs, open at its end, and made if need be; no other sweep is at it meanwhile.

    Raises:
        OSError: it cannot be had, or is a symbolic link.
    """
    path = runs_dir / ASKED.name
    while True:
        with open_own(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if same_file(file.fileno(), path):  # or else another sweep has put a new one in its place
                yield file
                return


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
