"""Runs that are killed without warning and started again end like undisturbed ones.

They are killed at random moments, some while a checkpoint is written. In the end, weights, metrics and noise are equal
bit for bit to those of a run that was never disturbed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qat_runner.training import checkpoint
from tests.outcome import result, same

pytestmark = pytest.mark.reliability
ARGS = [
    *("model=mobilenet_v3_small", "model.width=0.5", "dataset=fake", "dataset.image_size=16", "backend=eager"),
    *("dataset.fake_pictures=160", "batch_size=16", "dataset.val_batch_size=7", "epochs=2"),
    "checkpoint_minutes=1e-6",  # after every step
]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "qat_runner"]


def start(folder: Path, processes: int) -> "subprocess.Popen[bytes]":
    here = str(Path(sys.executable).parent)
    command = [sys.executable, "-m", "qat_runner"] if processes == 1 else [f"{here}/{TORCHRUN[0]}", *TORCHRUN[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([*command, *ARGS, f"run_dir={folder}"], env=environment, stdout=log, stderr=log)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process without warning, with all its children, which would survive the death of torchrun alone."""
    everyone = [process.pid]
    for pid in everyone:
        for children in Path("/proc").glob(f"{pid}/task/*/children"):
            everyone += map(int, children.read_text().split())
    for pid in everyone:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def unbroken(folder: Path, processes: int) -> None:
    assert start(folder, processes).wait() == 0


def broken(folder: Path, processes: int, chance: random.Random, longest: float) -> int:
    """Kill the run with all its processes and restart it until it finishes; return the number of kills."""
    kills = 0
    while True:
        process = start(folder, processes)
        seen = _progress(folder)
        began, patience = time.monotonic(), chance.uniform(0, longest)
        while process.poll() is None:
            if _progress(folder) > seen and time.monotonic() - began > patience and kills < 2:
                kill(process)
                kills += 1
                break
            if _progress(folder) == seen:
                began = time.monotonic()  # measured from the first checkpoint of this start
            time.sleep(0.01)
        if process.wait() == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, folder.with_suffix(".log").read_text()[-2000:]


def _progress(folder: Path) -> int:
    path = folder / "checkpoints" / checkpoint.LAST
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(("processes", "runs"), [(1, 20), (2, 5)])
def test_killed_runs_end_as_unbroken_ones(processes: int, runs: int, tmp_path: Path) -> None:
    unbroken(tmp_path / "unbroken", processes)
    expected = result(tmp_path / "unbroken")
    assert len(expected["steps.csv"]) == 2 * 10
    chance, identical, kills = random.Random(0), 0, 0
    for run in range(runs):
        folder = tmp_path / f"broken{run}"
        kills += broken(folder, processes, chance, longest=3.0)
        identical += same(result(folder), expected)
    print(f"{processes} process(es): {identical} of {runs} runs identical after {kills} kills")
    assert identical == runs
    assert kills >= runs
