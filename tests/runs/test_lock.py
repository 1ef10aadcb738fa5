import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from qat_runner.errors import BusyError
from qat_runner.runs import lock
from qat_runner.runs.lock import RunLock, alive, owner
from qat_runner.training.stop import StopRequest


def _hold(folder: Path, ready: Any, over: Any) -> None:
    with RunLock(folder):
        ready.set()
        over.wait(30)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of tmp_path/run."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", ready, over))
    process.start()
    assert ready.wait(30)
    yield process
    if process.is_alive():  # setting the event would block if the process was killed while waiting
        over.set()
    process.join()


def test_one_process_at_a_time(tmp_path: Path, holder: Any) -> None:
    folder = tmp_path / "run"
    assert alive(folder) and owner(folder) == f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(BusyError, match=f"run_dir=.*run: process {holder.pid} on .* is using it"), RunLock(folder):
        pass
    assert (folder / "lock").is_file()  # it belongs to the other process
    holder.kill()
    holder.join()
    assert not alive(folder)  # detected immediately, although its lock file still exists
    with RunLock(folder):
        assert owner(folder).startswith(f"process {os.getpid()} ")


def test_nothing_is_left_where_nothing_came_to_lie(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "b" / "run"):
        assert alive(tmp_path / "a" / "b" / "run")
    assert not (tmp_path / "a").exists()
    with RunLock(tmp_path / "a" / "b" / "run") as held:
        (held.folder / "result").write_text("x")
    assert [path.name for path in (tmp_path / "a" / "b" / "run").iterdir()] == ["result"]


def test_on_another_machine_signs_of_life_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").write_text(json.dumps({"process": 1, "host": "elsewhere"}))
    assert alive(tmp_path)
    old = time.time() - lock.STALE - 1
    os.utime(tmp_path / "lock", (old, old))
    assert not alive(tmp_path)
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / "lock", (old, old))
        time.sleep(0.2)
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 10


def test_a_signal_is_noted_and_passed_on_later() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            assert (stop.signal, got) == (signal.SIGUSR1, [])
            stop.pass_on()
            assert got == [signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(got) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        stop.pass_on()  # Python's default handler is not called, as it would only interrupt again
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
