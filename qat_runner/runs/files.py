"""Reading and writing the files of run folders: atomically, never through links, and always validated.

Run folders travel between people, machines and editors. Everything that is read is therefore validated against a typed
description, and an error is one sentence that names the file and the key.
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
from qat_runner.errors import UnreadableError, one_line

T = TypeVar("T")

TEMPORARY = ".tmp"
"""Suffix of files that are being written; a killed process may leave such a file."""

_OF_ONE_WRITER = re.compile(r"(\.\d+-[0-9a-f]{8})?\.tmp$")
"""Suffix of the name of a temporary file; `write_whole` adds the middle part, process id and random digits."""


@dataclass(frozen=True)
class TextFile:
    """A text file in a folder."""

    name: str

    def read(self, folder: Path) -> str | None:
        """Return the text; None if there is no file.

        Raises:
            UnreadableError: it is not a regular file, or not UTF-8.
        """
        return _reading(folder / self.name, lambda data: data.decode())


@dataclass(frozen=True)
class JsonFile(Generic[T]):
    """A JSON file in a folder, and the type of its content."""

    name: str
    kind: Any
    """T, or the part of it that is described; additional keys are kept unchanged"""

    def read(self, folder: Path) -> T | None:
        """Return the content; None if there is no file.

        Raises:
            UnreadableError: the content is invalid; the message names the key.
        """

        def parsed(data: bytes) -> T:
            content: T = json.loads(data.decode(), parse_constant=_no_number, object_pairs_hook=_without_doubles)
            fit(self.kind, content)
            return content

        return _reading(folder / self.name, parsed)

    def write(self, folder: Path, content: T) -> None:
        """Write the content atomically. NaN and infinity become null."""
        write_text(folder / self.name, json.dumps(_plain(content), indent=2) + "\n")


@dataclass(frozen=True)
class CsvFile(Generic[T]):
    """A CSV file in a folder, and the type of its rows."""

    name: str
    kind: Any
    """T; its keys are the columns"""

    def read(self, folder: Path) -> list[T]:
        """Return the rows without an incomplete last line; an empty list if there is no file.

        A last line is incomplete while it is being written, or if the run was killed meanwhile.

        Raises:
            UnreadableError: a row is invalid; the message names line and column.
        """

        def parsed(data: bytes) -> list[T]:
            whole = data[: data.rfind(b"\n") + 1]
            return [_row(self.kind, line, row) for line, row in _lines(whole.decode())]

        return _reading(folder / self.name, parsed) or []

    def append(self, folder: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
        """Add rows.

        Args:
            folder: the existing folder of the file; the file is created if needed.
            rows: the rows; missing columns stay empty. If the file exists, perhaps from an earlier version, values
                without a column in it are dropped.
            columns: the columns of a new file, if the description does not name all of them.
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
            os.fsync(file.fileno())  # after a crash, the checkpoint saved next must not be ahead of the rows

    def keep(self, folder: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> int:
        """Drop rows that are not wanted, invalid rows, and an incomplete last line.

        Returns:
            The number of complete lines that were dropped because they were invalid.
        """
        path = folder / self.name
        if not path.is_file() or path.is_symlink():
            return 0  # a link is reported when the file is opened for writing
        text = path.read_bytes().decode(errors="replace").replace("\0", "")
        head, *lines = text[: text.rfind("\n") + 1].split("\n")
        columns, rows, bad = next(csv.reader([head]), []), [], 0
        for number, line in enumerate(lines, 2):  # one by one: a stray quote would swallow the following lines
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
        reason = one_line(error)
    raise UnreadableError(f"{path}: cannot be read ({reason})")


def _content(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would block
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def _lines(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield number and cells of each line of a CSV file after the header."""
    reader = csv.reader(io.StringIO(text, newline=""))
    columns = next(reader, [])
    for cells in filter(None, reader):
        yield reader.line_num, _named(columns, cells)


def _named(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Return the cells of a line by column; empty if the cells do not match the columns."""
    fits = len(cells) == len(columns) == len({*columns})
    return dict(zip(columns, cells, strict=True)) if fits else {}


def _row(kind: Any, line: int, row: Mapping[str, str]) -> Any:
    try:
        if not row:
            raise ValueError("its cells do not match the columns")
        return fit(kind, row, strict=False)
    except ValueError as error:
        raise ValueError(f"line {line}, {error}") from None


def _columns(path: Path) -> list[str]:
    """Return the columns of a CSV file; empty if it does not exist or is a link."""
    if not path.is_file() or path.is_symlink():
        return []  # a link is reported when the file is opened for writing
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)}: appears twice")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):  # a file name may not be valid text
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: path holds either the old or the new content, and no temporary file remains."""
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Like `write_text`, for anything that `write` writes. A link is replaced, not followed; the last writer wins."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")  # unique to this writer
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise the name could exist without its content after a crash
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def becomes(name: str) -> str:
    """Return the final name of a temporary file; any other name is returned unchanged."""
    return _OF_ONE_WRITER.sub("", name)


def open_own(path: Path, mode: str, newline: str | None = None) -> IO[str]:
    """Open a UTF-8 text file of a run for writing.

    Raises:
        OSError: it cannot be opened, or is a symbolic link, whose target does not belong to the run.
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
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """While open, turn whatever a library raises on a full disk into an OSError that names the folder."""
    try:
        yield
    except Exception as error:
        if _is_full_disk(error) or shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders atomically; return False if the system does not support it (renameat2, Linux)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)
