"""Files of a folder of runs, as they are written and read: whole or not at all, never through a link, never trusted.

A folder of runs travels between people, machines and editors. So whatever is read is held against a typed description,
and what does not fit is told in one sentence that names the file and the key.
"""

import csv
import ctypes
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from qat_runner.description import fit
from qat_runner.errors import UnreadableError, told

T = TypeVar("T")

TEMPORARY = ".tmp"
"""Ending of what is being written; a process that was killed may leave one."""

_OF_ONE_WRITER = re.compile(r"(\.\d+-[0-9a-f]{8})?\.tmp$")
"""What follows a file's name in that of a temporary one; the middle, process and chance, is that of `write_whole`."""


@dataclass(frozen=True)
class TextFile:
    """A text in a folder."""

    name: str

    def read(self, folder: Path) -> str | None:
        """The text; None where there is no file.

        Raises:
            UnreadableError: it is no file, or not UTF-8.
        """
        return _reading(folder / self.name, lambda data: data.decode())


@dataclass(frozen=True)
class JsonFile(Generic[T]):
    """A JSON file in a folder, and what it holds."""

    name: str
    kind: Any
    """T, or what of it is described: keys beyond that are kept as they are"""

    def read(self, folder: Path) -> T | None:
        """The content; None where there is no file.

        Raises:
            UnreadableError: naming the key that does not fit.
        """

        def parsed(data: bytes) -> T:
            content: T = json.loads(data.decode(), parse_constant=_no_number, object_pairs_hook=_without_doubles)
            fit(self.kind, content)
            return content

        return _reading(folder / self.name, parsed)

    def write(self, folder: Path, content: T) -> None:
        """Whole or not at all. NaN and infinity become null."""
        write_text(folder / self.name, json.dumps(_plain(content), indent=2) + "\n")


@dataclass(frozen=True)
class CsvFile(Generic[T]):
    """A CSV file in a folder, and what its rows hold."""

    name: str
    kind: Any
    """T; its keys are the columns"""

    def read(self, folder: Path) -> list[T]:
        """The rows, without one that is being written, or was when its run was killed; none where there is no file.

        Raises:
            UnreadableError: naming line and column of what does not fit.
        """

        def parsed(data: bytes) -> list[T]:
            whole = data[: data.rfind(b"\n") + 1]
            return [_row(self.kind, line, row) for line, row in _lines(whole.decode())]

        return _reading(folder / self.name, parsed) or []

    def append(self, folder: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
        """Add rows.

        Args:
            folder: where the file lies, or is begun.
            rows: a column that one lacks stays empty; of a file that an earlier version began, what has no column is
                left out.
            columns: where the description does not name them all.
        """
        path = folder / self.name
        known = _columns(path)
        columns = known or columns or list(self.kind.__annotations__)
        with open_own(path, "a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore" if known else "raise")
            if not known:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint, which follows, must not be ahead of them after a crash

    def keep(self, folder: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> int:
        """Drop the rows that are not wanted, those that do not fit, and a line that was cut.

        Returns:
            How many whole lines were dropped because they did not fit.
        """
        path = folder / self.name
        if not path.is_file() or path.is_symlink():
            return 0  # opening it for more rows tells of a link
        text = path.read_bytes().decode(errors="replace").replace("\0", "")
        head, *lines = text[: text.rfind("\n") + 1].split("\n")
        columns, rows, bad = next(csv.reader([head]), []), [], 0
        for number, line in enumerate(lines, 2):  # each by itself: a stray quote would swallow those that follow it
            try:
                for cells in filter(None, csv.reader([line])):
                    row = _named(columns, cells)
                    if wanted(_row(self.kind, number, row)):
                        rows.append(row)
            except (ValueError, csv.Error):
                bad += 1
        if rows:
            temporary = CsvFile[T](f"{self.name}{TEMPORARY}", self.kind)
            (folder / temporary.name).unlink(missing_ok=True)
            temporary.append(folder, rows, list(rows[0]))
            os.replace(folder / temporary.name, path)
        else:
            path.unlink()
        return bad


def _reading(path: Path, parse: Callable[[bytes], T]) -> T | None:
    try:
        return parse(_content(path))
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 at byte {error.start}"
    except RecursionError:
        reason = "it is nested too deeply"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, csv.Error) as error:
        reason = told(error)
    raise UnreadableError(f"{path}: cannot be read ({reason})")


def _content(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no file")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def _lines(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and cells of each line of a CSV file but the first, which has the names of the columns."""
    reader = csv.reader(io.StringIO(text, newline=""))
    columns = next(reader, [])
    for cells in filter(None, reader):
        yield reader.line_num, _named(columns, cells)


def _named(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """The cells of a line by column; nothing where they are not those of the columns."""
    fits = len(cells) == len(columns) == len({*columns})
    return dict(zip(columns, cells, strict=True)) if fits else {}


def _row(kind: Any, line: int, row: Mapping[str, str]) -> Any:
    try:
        if not row:
            raise ValueError("its cells are not those of the columns")
        return fit(kind, row, strict=False)
    except ValueError as error:
        raise ValueError(f"line {line}, {error}") from None


def _columns(path: Path) -> list[str]:
    """Those of a file that has some."""
    if not path.is_file() or path.is_symlink():
        return []  # opening it for more rows tells of a link
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)}: is there twice")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):  # the name of a file may be no text
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def write_text(path: Path, text: str) -> None:
    """Write a file, UTF-8: path holds the old content or the new one, never half of it, and nothing else is left."""
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """The same, of whatever `write` writes; a link is replaced, not followed. Of several writers the last one wins."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")  # of this writer alone
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else the name might be there after a crash of the machine, and the content not
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def becomes(name: str) -> str:
    """The name that a temporary file is to have in the end; of any other file its own."""
    return _OF_ONE_WRITER.sub("", name)


def open_own(path: Path, mode: str, newline: str | None = None) -> IO[str]:
    """Open a text file of ours, UTF-8, to be written to.

    Raises:
        OSError: it cannot be, or is a symbolic link: what that leads to is not ours.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(error.errno, "is a symbolic link, which is not followed", str(path)) from error
            raise

    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline=newline, opener=opener)


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """While open, whatever a library makes of a full disk becomes an OSError that says so, and where."""
    try:
        yield
    except Exception as error:
        if _tells_of_full_disk(error) or shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def _tells_of_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change their places at one stroke; False where the system cannot (renameat2, Linux)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)
