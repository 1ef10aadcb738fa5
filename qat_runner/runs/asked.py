"""The list, in a folder of runs, of the run folders that sweeps asked for."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from qat_runner.config.allowed import LONGEST_NAME
from qat_runner.errors import UnreadableError, told
from qat_runner.runs.files import open_own, write_text
from qat_runner.runs.records import ASKED


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
