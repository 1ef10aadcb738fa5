"""The list, in a folder of runs, of the run folders that sweeps have requested."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qat_runner.config.allowed import LONGEST_NAME
from qat_runner.errors import UnreadableError, one_line
from qat_runner.runs.files import open_own, write_text
from qat_runner.runs.lock import same_file
from qat_runner.runs.records import ASKED


def record_requested(folders: Iterable[Path]) -> list[Path]:
    """Add run folders to the lists in their parent folders; return the folders created for this, deepest last.

    Raises:
        UnreadableError: an existing list is not valid.
    """
    made: list[Path] = []
    for runs_dir, names in _by_place(folders).items():
        if {*names} <= {*requested(runs_dir)}:
            continue
        made += [path for path in reversed((runs_dir, *runs_dir.parents)) if not path.exists()]
        runs_dir.mkdir(parents=True, exist_ok=True)
        with _held(runs_dir) as file:
            known = {*requested(runs_dir)}
            file.write(_lines(name for name in names if name not in known))
    return made


def remove_requested(folders: Iterable[Path], made: Sequence[Path]) -> None:
    """Remove the run folders of rejected runs, which do not exist, from the lists; then delete what is empty.

    Raises:
        UnreadableError: a list is not valid.
    """
    for runs_dir, names in _by_place(folders).items():
        gone = {name for name in names if not (runs_dir / name).exists()}
        if not gone & {*requested(runs_dir)}:
            continue
        with _held(runs_dir):
            left = [name for name in requested(runs_dir) if name not in gone]
            if left:
                write_text(runs_dir / ASKED.name, _lines(left))
            else:
                (runs_dir / ASKED.name).unlink()
    for path in reversed(made):
        with suppress(OSError):  # not empty
            path.rmdir()


def _by_place(folders: Iterable[Path]) -> dict[Path, list[str]]:
    """Return the names of folders, grouped by parent folder."""
    found: dict[Path, dict[str, None]] = {}
    for folder in folders:
        found.setdefault(folder.parent, {})[folder.name] = None
    return {runs_dir: [*names] for runs_dir, names in found.items()}


@contextmanager
def _held(runs_dir: Path) -> Iterator[IO[str]]:
    """Open the list of a folder of runs for appending, creating it if needed, and lock it against other sweeps.

    Raises:
        OSError: the list cannot be opened, or is a symbolic link.
    """
    path = runs_dir / ASKED.name
    while True:
        with open_own(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if same_file(file.fileno(), path):  # otherwise another sweep has replaced the list
                yield file
                return


def _lines(names: Iterable[str]) -> str:
    """Return one line per name; names may not be valid in the encoding of the terminal."""
    return "".join(f"{os.fsencode(name).decode(errors='backslashreplace')}\n" for name in names)


def requested(runs_dir: Path) -> list[str]:
    """Return the names of all run folders that sweeps requested in a folder, in the order of the requests.

    Raises:
        UnreadableError: the list is not valid.
    """
    names = [os.fsdecode(name.encode()) for name in (ASKED.read(runs_dir) or "").splitlines() if name]
    for name in names:
        if "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > LONGEST_NAME:
            raise UnreadableError(f"{runs_dir / ASKED.name}: cannot be read ({one_line(name)}: is not a folder name)")
    return names
