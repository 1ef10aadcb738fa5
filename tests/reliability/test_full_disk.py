"""A disk fills up while a checkpoint is written: one error message, the previous checkpoint stays, the run resumes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_runner.training import checkpoint

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk"),
]
RUN = [
    *("model=mobilenet_v3_small", "dataset=fake", "dataset.image_size=16", "backend=eager", "dataset.fake_pictures=64"),
    *("batch_size=16", "epochs=2", "checkpoint_minutes=1e-6", "noise_batches=0"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MiB: enough for two checkpoints of 12 MiB, but not for a third one and best.pt."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def qat_run(folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "qat_runner", *RUN, f"run_dir={folder}"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_disk_that_fills_up(disk: Path, tmp_path: Path) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(12 * 2**20))
    done = qat_run(disk / "run")
    assert done.returncode == 1
    print(done.stderr.strip())
    assert "No space left on device" in done.stderr and "what was recorded before is intact" in done.stderr
    assert "Traceback" not in done.stderr
    saved = checkpoint.newest(disk / "run" / "checkpoints")  # undamaged
    assert not [*(disk / "run").glob("**/*.tmp")]
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    assert qat_run(disk / "run").returncode == 0
    log = (disk / "run" / "log.txt").read_text()
    assert (
        f"step {saved['state']['step']} of the next" in log or f"resuming after epoch {saved['state']['epoch']}" in log
    )
    assert qat_run(tmp_path / "undisturbed").returncode == 0
    ours, expected = (
        json.loads((folder / "summary.json").read_text()) for folder in (disk / "run", tmp_path / "undisturbed")
    )
    assert [ours[key] for key in ("top1", "loss", "steps")] == [expected[key] for key in ("top1", "loss", "steps")]
