"""The lock that allows one process at a time in a run folder, with a heartbeat that other machines can check."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from qat_runner.errors import BusyError, UnreadableError
from qat_runner.runs.records import LOCK, Owner

BEAT = 15.0
"""Seconds between heartbeats."""
PATIENCE = 10
"""Tenths of a second to keep trying to take a lock."""
STALE = 4 * BEAT
"""Seconds without a heartbeat after which a process counts as dead."""


class RunLock:
    """Context manager that locks a run folder. It creates the folder if needed, and removes it again if it stays empty.

    Args:
        folder: folder to lock.
        name: name of the folder in the error message for a second process; None uses run_dir=FOLDER.

    Raises, on entering:
        BusyError: another process holds the lock.
        OSError: the folder cannot be created or the lock cannot be written; nothing is left behind.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or f"run_dir={folder}"
        self._path = folder / LOCK.name
        self._made: list[Path] = []
        self._file: int | None = None
        self._over = threading.Event()

    def __enter__(self) -> "RunLock":
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._try()
            os.truncate(self._file, 0)
            os.write(self._file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError:
            self._leave()
            raise
        threading.Thread(target=self._beat, daemon=True).start()
        os.register_at_fork(after_in_child=self._forget)
        return self

    def _try(self) -> None:
        """Take the lock, unless its previous holder removes the file in the meantime."""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                error.strerror = f"{LOCK.name} is a symbolic link, which is not followed"
            raise
        try:
            _take(handle)
        except BlockingIOError as error:
            os.close(handle)
            raise BusyError(f"{self.name}: {owner(self.folder)} is using it") from error
        except OSError:  # the file system does not support locks
            os.close(handle)
            if self._made:
                self._path.unlink(missing_ok=True)
            raise
        if same_file(handle, self._path):
            self._file = handle
        else:
            os.close(handle)

    def _forget(self) -> None:
        """Close the lock in a child process, such as a worker that decodes images: it must not outlast the parent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._leave()

    def _leave(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for path in self._made:
                path.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _take(handle: int) -> None:
    """Lock a file, retrying briefly: `alive` may be testing it, or a child of a dead process may still be exiting."""
    for _ in range(PATIENCE):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def same_file(handle: int, path: Path) -> bool:
    """Return whether an open file is the one that is currently at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def alive(folder: Path) -> bool:
    """Return whether a process is using a folder: a local one by its lock, a remote one by its latest heartbeat."""
    try:
        handle = os.open(folder / LOCK.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):  # there is no lock, or none that a run wrote
        return False
    try:
        who = _read(folder)
        if who is None or who["host"] != socket.gethostname():
            return time.time() - os.fstat(handle).st_mtime < STALE
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def owner(folder: Path) -> str:
    """Describe the process that holds the lock of a folder."""
    who = _read(folder)
    return f"process {who['process']} on {who['host']}" if who else "another process"


def _read(folder: Path) -> Owner | None:
    """Return the owner; None if it is unknown: the lock was taken just now, or another program wrote the file."""
    try:
        return LOCK.read(folder)
    except UnreadableError:
        return None
