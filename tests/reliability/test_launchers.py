"""Other ways of starting: rows in parallel, detached from the shell, and a sweep by several processes together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat_runner.runs.status import statuses

pytestmark = pytest.mark.reliability
SMALL = [
    *("backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=32", "epochs=1"),
]
ROWS = ["-m", *SMALL, "lr=0.05,0.1,1e30", "seed=0"]  # the last one diverges


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def losses(runs_dir: Path) -> list[float]:
    return sorted(json.loads(path.read_text())["loss"] for path in runs_dir.glob("*/summary.json"))


def test_every_launcher_comes_to_the_same(tmp_path: Path) -> None:
    qat_run = [sys.executable, "-m", "qat_runner"]
    done = run(*qat_run, *ROWS, f"runs_dir={tmp_path}/here")
    assert done.returncode == 1 and "the loss became" in done.stderr
    expected = losses(tmp_path / "here")
    assert len(expected) == 2

    parallel = run(*qat_run, *ROWS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"runs_dir={tmp_path}/parallel")
    assert parallel.returncode == 1, parallel.stderr
    assert "the loss became" in parallel.stderr and "Traceback" not in parallel.stderr
    assert losses(tmp_path / "parallel") == expected

    detached = run(*qat_run, *ROWS, "--detach", f"runs_dir={tmp_path}/detached")
    assert detached.returncode == 0 and "is running" in detached.stdout
    end = time.monotonic() + 120
    while sum(status.state in ("finished", "failed") for status in statuses(tmp_path / "detached")) < 3:
        assert time.monotonic() < end
        time.sleep(1)
    assert losses(tmp_path / "detached") == expected


def test_a_sweep_of_two_processes(tmp_path: Path) -> None:
    here = Path(sys.executable).parent
    torchrun = [str(here / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "qat_runner"]
    rows = ["-m", *SMALL, "seed=0,1", f"runs_dir={tmp_path}/runs"]
    done = run(*torchrun, *rows)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 2  # told once, not by each process
    assert [status.state for status in statuses(tmp_path / "runs")] == ["finished"] * 2
    again = run(*torchrun, *rows)
    assert again.returncode == 0 and again.stdout.count("is finished already") == 2
    refused = run(*torchrun, *SMALL, "batch_size=31", f"run_dir={tmp_path}/odd")
    assert refused.returncode != 0
    assert "batch_size=31: must be a multiple of 2, the number of processes" in refused.stderr
    assert not (tmp_path / "odd").exists()
