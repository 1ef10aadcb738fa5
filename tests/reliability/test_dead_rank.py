"""If one of two processes dies, the job soon ends with an error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability
SECONDS = 60
"""Time limit for the end of the job."""


def test_a_dead_process_ends_the_job(tmp_path: Path) -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    small = ["model=resnet20", "dataset=fake", "dataset.image_size=8", "batch_size=16", "epochs=1000", "backend=eager"]
    job = subprocess.Popen(
        [str(torchrun), "--standalone", "--nproc-per-node", "2", "-m", "qat_runner", *small, f"run_dir={tmp_path}/run"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "run" / "metrics.csv").is_file():
        assert job.poll() is None
        time.sleep(0.5)
    children = [
        int(pid) for path in Path(f"/proc/{job.pid}/task").glob("*/children") for pid in path.read_text().split()
    ]
    workers = [pid for pid in children if b"qat_runner" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2, children
    began = time.monotonic()
    os.kill(int(workers[1]), signal.SIGKILL)
    assert job.wait(SECONDS) != 0
    print(f"ended {time.monotonic() - began:.1f} s after one of its processes had died")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
