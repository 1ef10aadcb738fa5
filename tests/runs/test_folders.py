"""Links and damaged files in run folders, concurrent writers, and processes killed while replacing an export."""

import errno
import os
import re
import stat
import subprocess
import sys
import threading
import weakref
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from qat_runner.config import Config, from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.errors import BusyError, RunError
from qat_runner.experiment import running
from qat_runner.experiment.running import _remove
from qat_runner.exporting import run_export
from qat_runner.quant.kernels import compiled
from qat_runner.runs import files, lock, requested_runs
from qat_runner.runs.environment import LAUNCHED, environment
from qat_runner.runs.files import becomes, open_own, write_text, write_whole
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.lock import RunLock
from qat_runner.runs.record import Record
from qat_runner.runs.records import ENVIRONMENT, METRICS, STEPS
from qat_runner.runs.requested_runs import record_requested, remove_requested
from qat_runner.runs.trackers import Tracked
from qat_runner.training import checkpoint

STEP = {"epoch": 12, "step": 1, "loss": 0.5, "lr": 0.1}
REPORT = [sys.executable, "-c", "import sys; from qat_runner.cli import qat_report; sys.exit(qat_report())"]
EPOCH = {"epoch": 1, "val_top1": 50.0}


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A file that does not belong to a run."""
    path = tmp_path / "thesis"
    path.write_text("years of work")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


# Links


def test_a_lock_that_is_a_link(thesis: Path, run: Path) -> None:
    (run / "lock").symlink_to(thesis)
    with pytest.raises(OSError, match="lock is a symbolic link, which is not followed"), RunLock(run):
        pass
    assert thesis.read_text() == "years of work" and not lock.alive(run)


@pytest.mark.parametrize("name", ["steps.csv", "asked.txt", "log.txt", "error.txt"])
def test_what_is_added_to_is_no_link(name: str, thesis: Path, run: Path) -> None:
    (run / name).symlink_to(thesis)
    with pytest.raises(OSError, match="is a symbolic link, which is not followed"):
        STEPS.append(run, [STEP]) if name == "steps.csv" else open_own(run / name, "a")
    assert thesis.read_text() == "years of work"


def test_the_list_of_what_was_asked_for_is_no_link(thesis: Path, run: Path) -> None:
    (run / "asked.txt").symlink_to(thesis)
    with pytest.raises(OSError, match="is a symbolic link"):
        record_requested([run / "one"])
    assert thesis.read_text() == "years of work"


def test_what_is_written_replaces_a_link(thesis: Path, run: Path) -> None:
    (run / "summary.json").symlink_to(thesis)
    write_text(run / "summary.json", "{}")
    (run / "last.tmp").symlink_to(thesis)
    checkpoint.save(run / "last.pt", {})
    assert thesis.read_text() == "years of work"
    assert not (run / "summary.json").is_symlink() and {path.name for path in run.iterdir()} == {
        "summary.json",
        "last.pt",
    }
    assert stat.S_IMODE((run / "summary.json").stat().st_mode) & 0o444 == 0o444


def test_a_link_to_a_scratch_disk_is_emptied_and_kept(thesis: Path, run: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "deep").mkdir(parents=True)
    (scratch / "last.pt").touch()
    (scratch / "elsewhere").symlink_to(tmp_path)
    (run / "checkpoints").symlink_to(scratch)
    _remove(run / "checkpoints")
    assert (run / "checkpoints").is_symlink() and scratch.is_dir() and not [*scratch.iterdir()]
    assert thesis.is_file()
    (run / "log.txt").symlink_to(thesis)
    _remove(run / "log.txt")
    assert not (run / "log.txt").is_symlink() and thesis.is_file()


def test_a_lock_that_cannot_be_had_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name, failing in ((lock, "_take", without), (os, "write", full)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(OSError, match=r"No (locks|space)"), RunLock(tmp_path / "a" / "b"):
                pass
        assert not (tmp_path / "a").exists()


# Concurrent processes


def test_writers_side_by_side_put_no_half_file_in_place(run: Path) -> None:
    """The second writer is interrupted in the middle of its file while the first one is still writing."""

    def first(file: IO[bytes]) -> None:
        file.write(b"first")
        with pytest.raises(StopIteration):
            write_whole(run / "page", second)

    def second(file: IO[bytes]) -> None:
        file.write(b"sec")
        file.flush()
        raise StopIteration

    write_whole(run / "page", first)
    assert {path.name: path.read_text() for path in run.iterdir()} == {"page": "first"}


def test_sweeps_side_by_side_lose_no_line_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sweep removes its row while another adds one: the second waits and then uses the new list."""
    runs = tmp_path / "runs"
    made = record_requested([runs / "refused", runs / "kept"])
    other = threading.Thread(target=record_requested, args=([runs / "added"],))
    (runs / "kept").mkdir()

    def slowly(path: Path, text: str) -> None:
        other.start()
        other.join(0.1)
        assert other.is_alive() and requested_runs.requested(runs) == ["refused", "kept"]
        write_text(path, text)

    monkeypatch.setattr(requested_runs, "write_text", slowly)
    remove_requested([runs / "refused", runs / "kept"], made)
    other.join()
    assert requested_runs.requested(runs) == ["kept", "added"]
    monkeypatch.setattr(requested_runs, "write_text", write_text)
    remove_requested([runs / "kept", runs / "added"], made)
    (runs / "kept").rmdir()
    remove_requested([runs / "kept"], made)
    assert not runs.exists()


def test_what_a_killed_writer_left_is_ours_and_goes(run: Path) -> None:
    config = from_hydra(compose_config(["model=resnet8", "dataset=digits"]))
    left = [run / name for name in ("metrics.csv.tmp", "report.html.77-0123abcd.tmp", "noise.png.1-ffffffff.tmp")]
    for path in (*left, run / "notes.tmp", run / "notes.1-ffffffff.tmp"):
        path.touch()
    assert [becomes(path.name) for path in left] == ["metrics.csv", "report.html", "noise.png"]
    running._clear(config, run)
    assert {path.name for path in run.iterdir()} == {"notes.tmp", "notes.1-ffffffff.tmp"}


# CSV files


def test_a_line_that_was_cut_is_dropped_before_more_is_added(run: Path) -> None:
    (run / "steps.csv").write_bytes(b"epoch,step,loss,lr\r\n11,1,0.5,0.1\r\n1")
    with closing(Record(Tracked("run", run, {}, 11))) as record:
        record.steps([STEP])
    assert [(row["epoch"], row["step"]) for row in STEPS.read(run)] == [(11, 1), (12, 1)]


def test_lines_that_do_not_fit_are_dropped_and_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "steps.csv").write_bytes(b"epoch,step,loss,lr\n1,1,0.5,0.1\n\0\0\0\n1,2\n1,2,\xff,0.1\n1,3,0.25,0.1\n")
    (run / "metrics.csv").write_bytes(b"\xff\0\n1,2,3\n")
    with caplog.at_level("WARNING", "qat_runner"), closing(Record(Tracked("run", run, {}, 0), 3)):
        pass
    assert [row["loss"] for row in STEPS.read(run)] == [0.5, 0.25] and METRICS.read(run) == []
    assert "steps.csv: 2 damaged lines were dropped" in caplog.text


@pytest.mark.parametrize("rows", [9, 9000])  # as one cell, 9 lines are small enough for csv and 9000 are not
def test_a_damaged_line_takes_no_others_with_it(run: Path, rows: int) -> None:
    STEPS.append(run, [STEP | {"step": step} for step in range(1, rows + 1)])
    lines = (run / "steps.csv").read_text().split("\n")
    lines[3] = lines[3].replace(",", ',"', 1)
    (run / "steps.csv").write_text("\n".join(lines))
    assert STEPS.keep(run, lambda row: True) == 1
    assert [row["step"] for row in STEPS.read(run)] == [step for step in range(1, rows + 1) if step != 3]


# A full disk


def test_tensorboard_on_a_full_disk_says_nothing_of_its_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def full(writer: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = threading.excepthook
    record = Record(Tracked("run", run, {}), trackers=["tensorboard"])
    monkeypatch.setattr(RecordWriter, "write", full)
    record.epoch(EPOCH)
    assert "tracker tensorboard: gave up (OSError: [Errno 28] No space left on device, " in caplog.text
    record.epoch(EPOCH)
    record.close()
    assert [row["epoch"] for row in METRICS.read(run)] == [EPOCH["epoch"]] * 2
    assert capsys.readouterr().err == "" and threading.excepthook is before and len(caplog.records) == 1


@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "x"), RuntimeError("x: No space left on device")])
def test_a_full_disk_is_named(cause: Exception, tmp_path: Path) -> None:
    error = ValueError("cannot export this network")
    error.__cause__ = cause
    with pytest.raises(OSError, match="No space left on device") as caught, files.explaining_full_disk(tmp_path):
        raise error
    assert caught.value.filename == str(tmp_path)


# Replacing an export


def swap(out: Path) -> None:
    with run_export._in_place_of(out) as folder:
        (folder / "export.json").write_text("new")


@pytest.fixture
def old(run: Path) -> Path:
    (run / "export").mkdir()
    (run / "export" / "export.json").write_text("old")
    return run / "export"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_export_takes_the_place_of_another(can_exchange: bool, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(run_export, "exchange", lambda one, other: False)
    swap(old)
    assert (old / "export.json").read_text() == "new" and [*old.parent.iterdir()] == [old]


def test_an_export_that_fails_leaves_the_old_one(old: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_export._in_place_of(old):
        raise ZeroDivisionError
    assert (old / "export.json").read_text() == "old" and [*old.parent.iterdir()] == [old]


class Killed(BaseException):
    """Simulates the death of a process."""


@pytest.mark.parametrize(
    "moment", [pytest.param(n, marks=[pytest.mark.reliability] * (n not in (0, 3))) for n in range(5)]
)
def test_an_export_that_is_killed_leaves_the_old_one_or_the_new_one(moment: int, old: Path) -> None:
    """The process is killed before its first, second, ... call that changes a folder."""
    code = (
        "import os, pathlib, shutil, sys\n"
        "from qat_runner.exporting import run_export\n"
        "left = [int(sys.argv[1])]\n"
        "def mortal(function):\n"
        "    def call(*args, **options):\n"
        "        left[0] -= 1\n"
        "        if left[0] < 0: os._exit(9)\n"
        "        return function(*args, **options)\n"
        "    return call\n"
        "run_export.exchange = mortal(run_export.exchange)\n"
        "shutil.rmtree = mortal(shutil.rmtree)\n"
        "pathlib.Path.rename = mortal(pathlib.Path.rename)\n"
        "with run_export._in_place_of(pathlib.Path(sys.argv[2])) as folder:\n"
        "    (folder / 'export.json').write_text('new')\n"
    )
    command = [sys.executable, "-c", code, str(moment), str(old)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert (old / "export.json").read_text() in ("old", "new")
    assert {path.name for path in old.parent.iterdir()} <= {"export", "export.tmp"}
    swap(old)
    assert (old / "export.json").read_text() == "new" and [*old.parent.iterdir()] == [old]


def test_one_killed_between_two_renames_is_put_right(old: Path) -> None:
    (old.parent / "export.tmp").mkdir()
    old.rename(old.parent / "export.tmp" / "old")
    with pytest.raises(ZeroDivisionError), run_export._in_place_of(old):
        raise ZeroDivisionError
    assert (old / "export.json").read_text() == "old"


def test_the_second_of_two_exports_is_told(old: Path) -> None:
    with (
        run_export._in_place_of(old),
        pytest.raises(BusyError, match=rf"export: process {os.getpid()} on .* is using it"),
        run_export._in_place_of(old),
    ):
        pass
    assert [*old.parent.iterdir()] == [old]


def test_a_link_to_an_export_stays_one(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    swap(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (old / "export.json").read_text() == "new"


# Compilers and terminals


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that installs a script as the compiler."""

    def use(script: str) -> None:
        path = tmp_path / "cxx"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
        compiled.library.cache_clear()

    yield use
    compiled.library.cache_clear()


def test_a_compiler_that_speaks_no_utf8(compiler: Any) -> None:
    compiler(r"printf 'Fehler: ung\374ltig\n' >&2; exit 1")
    with pytest.warns(RuntimeWarning, match="compiling failed, using eager instead \\(Fehler: ung�ltig\\)"):
        assert compiled.library() is None


@pytest.mark.skipif(not compiled.available(), reason="needs a C++ compiler")
def test_a_library_without_our_functions(compiler: Any) -> None:
    real = compiled.compiler()
    compiler(f'while [ "$1" != -o ]; do shift; done; echo "int x;" | {real} -x c++ -shared -fPIC -o "$2" -')
    with pytest.warns(RuntimeWarning, match="using eager instead .*qat_octav"):
        assert compiled.library() is None


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("".join(f"{i:0100}\n" for i in range(3000)))  # more than a pipe holds
    with subprocess.Popen(
        [*REPORT, "status", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_bytes("rün\n".encode())
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*REPORT, "status", str(tmp_path)], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"") and "rün" in done.stdout.decode()


def test_a_run_that_is_cleared_away_is_at_no_time_finished_or_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = RunFolder(tmp_path)
    for path in own.contents:
        path.touch()
    left = []

    def remove(path: Path) -> None:
        path.unlink(missing_ok=True)
        left.append({path for path in own.contents if path.exists()})

    monkeypatch.setattr(running, "_remove", remove)
    running._clear(from_hydra(compose_config(["model=resnet8", "dataset=digits", "overwrite=true"])), tmp_path)
    assert not left[-1]
    for paths in left:
        assert own.path / "summary.json" not in paths and (own.config in paths or not paths)


@pytest.mark.parametrize(
    ("begun_by", "now", "begun"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # an interactive shell in a Slurm job
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({LAUNCHED: "request", "SLURM_JOB_ID": "7"}, {LAUNCHED: "request"}, True),
        ({LAUNCHED: "request"}, {LAUNCHED: "another"}, False),
        ({}, {}, False),
        (None, {LAUNCHED: "request"}, False),  # nothing was started before
    ],
)
def test_a_run_is_begun_anew_once_by_a_job(
    begun_by: dict[str, str] | None, now: dict[str, str], begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job repeats overwrite=true, which must take effect only once."""
    config = from_hydra(compose_config(["model=resnet8", "dataset=digits", "overwrite=true"]))
    if begun_by is not None:
        with monkeypatch.context() as patch:
            for name, value in begun_by.items():
                patch.setenv(name, value)
            ENVIRONMENT.write(tmp_path, {**environment(), "resumed": []})
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    assert running._already_overwritten(config, tmp_path) == begun
    assert not running._already_overwritten(replace(config, overwrite=False), tmp_path)


def test_nothing_stays_in_memory_while_another_run_is_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Built:
        pass

    built: list[weakref.ref[Built]] = []

    def tried(config: Config) -> tuple[Built, Built]:
        both = Built(), Built()
        built.extend(map(weakref.ref, both))
        return both

    monkeypatch.setattr(running, "preflight", lambda config: tmp_path)
    monkeypatch.setattr(running, "try_policy", tried)
    seen: list[list[Built | None]] = []
    monkeypatch.setattr(running, "run_after_others", lambda needed: seen.append([left() for left in built]))
    config = from_hydra(compose_config(["model=resnet8", "dataset=digits"]))
    assert running._finished_first(config, config, "the baseline") == tmp_path
    assert seen == [[None, None]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "a larger accumulate (now 1) or a smaller batch_size (now 128) needs less, and in validation a smaller "),
        (("mode=allocate", "budget=4", "weights=w.pt"), "a smaller allocation.batch_size (now 32) needs less"),
        (("mode=evaluate", "weights=w.pt"), "a smaller dataset.val_batch_size (now 500) needs less"),
        (
            ("mode=ptq", "weights=w.pt", "clipping=static_octav"),
            "needs less, and in calibration a smaller clipping.calibration_batch_size (now 64)",
        ),
    ],
)
def test_what_needs_less_memory_is_a_key_of_the_mode(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pt").touch()
    config = from_hydra(compose_config(["model=resnet8", "dataset=digits", "device=cpu", *words]))
    error = running._as_sentence(torch.OutOfMemoryError("CUDA"), replace(config, device="auto"), tmp_path)
    assert message in str(error) and re.match("out of memory on (cpu|cuda:0): ", str(error))


def test_a_new_sitting_has_no_error_of_the_last(tmp_path: Path) -> None:
    config = from_hydra(compose_config(["model=resnet8", "dataset=digits"]))
    for reason in ("first", "second"):
        with pytest.raises(RunError), running._reporting_failures(config, tmp_path):
            raise ValueError(reason)
        assert f"internal error (ValueError: {reason})" in (tmp_path / "error.txt").read_text()
