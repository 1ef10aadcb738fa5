"""A sweep on a real Slurm: one job is preempted, one cancelled, one fails, and the submitting shell is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_runner.runs.records import SUMMARY
from qat_runner.runs.status import Status, statuses
from qat_runner.training import checkpoint

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs root and slurm-wlm, munge of the system"
    ),
]
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "slurm"
RATES = [*(f"{rate / 100:g}" for rate in range(1, 8)), "1e30"]  # the last one makes the network diverge
SWEEP = [
    *("-m", "backend=eager", "model=mobilenet_v3_small", "model.width=0.5", "dataset=fake", "dataset.image_size=16"),
    *("dataset.fake_pictures=320", "batch_size=16", "epochs=4", f"lr={','.join(RATES)}", "checkpoint_minutes=0.02"),
]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    subprocess.run([str(SCRIPTS / "start.sh"), str(tmp_path / "slurm")], check=True)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    subprocess.run([str(SCRIPTS / "stop.sh"), str(tmp_path / "slurm")], check=True)


def qat_run(*args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "qat_runner", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def queue(*states: str) -> list[str]:
    """Return the ids of the jobs of the sweep in these states."""
    command = ["squeue", "-h", "-r", "-n", "qat-run", "-o", "%i", "-t", ",".join(states)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def wait(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.5)


def by_rate(runs_dir: Path) -> dict[str, tuple[Status, dict[str, Any]]]:
    """Return the status and the result of each run by learning rate."""
    found = {}
    for status in statuses(runs_dir):
        folder, came_to = runs_dir / status.name, {}
        if status.state == "finished":
            summary: Any = SUMMARY.read(folder)
            came_to = {key: summary[key] for key in ("top1", "loss", "sqnr_db", "quantization_mse", "steps")}
            came_to["weights"] = checkpoint.load(folder / "checkpoints" / checkpoint.LAST)["model"]
        line = next(line for line in (folder / "config.yaml").read_text().splitlines() if line.startswith("lr:"))
        found[line.split()[1]] = status, came_to
    return found


def test_a_sweep_that_is_disturbed_ends_as_one_that_is_not(tmp_path: Path, slurm: None) -> None:
    calm, runs = tmp_path / "calm", tmp_path / "runs"
    submitting = qat_run(*SWEEP, *SLURM, f"runs_dir={runs}")
    wait(lambda: len(queue("RUNNING", "PENDING")) == len(RATES), 120)
    submitting.send_signal(signal.SIGKILL)  # the submitting shell dies
    submitting.communicate()
    # Two jobs run at a time. Once both have written a checkpoint, one is cancelled and the other is preempted.
    wait(lambda: len([*runs.glob(f"*/checkpoints/{checkpoint.LAST}")]) >= 2, 120)
    first, second = queue("RUNNING")
    subprocess.run(["scancel", first], check=True)
    urgent = ["sbatch", "-p", "urgent", "-n", str(os.cpu_count()), "-o", "/dev/null", "--wrap", "sleep 3"]
    subprocess.run(urgent, check=True)
    wait(lambda: second in queue("PENDING"), 60)
    print(f"job {first} cancelled, job {second} preempted and back in the queue")
    wait(lambda: not queue("RUNNING", "PENDING", "COMPLETING"), 900)
    states = sorted(status.state for status in statuses(runs))
    assert states == ["failed", *["finished"] * 6, "stale"]

    again = qat_run(*SWEEP, f"runs_dir={runs}")  # resumes the cancelled run and retries the failed one
    said, _ = again.communicate()
    assert again.returncode == 1, said
    assert said.count("is finished already") == 6 and "the loss became" in said

    undisturbed = qat_run(*SWEEP, f"runs_dir={calm}")
    assert undisturbed.communicate() and undisturbed.returncode == 1
    disturbed, expected = by_rate(runs), by_rate(calm)
    assert disturbed.keys() == expected.keys()
    equal = 0
    for rate, (status, came_to) in expected.items():
        assert disturbed[rate][0].state == status.state
        if status.state == "finished":
            ours = disturbed[rate][1]
            assert all(torch.equal(ours["weights"][key], t) for key, t in came_to["weights"].items())
            assert {**ours, "weights": 0} == {**came_to, "weights": 0}
            equal += 1
    print(f"{equal} results equal those of an undisturbed sweep, {len(RATES) - equal} failed as it does there")
    assert equal == 7
    logs = "\n".join(path.read_text() for path in runs.glob("*/log.txt"))
    print(f"{logs.count('resuming after')} times a run resumed from a checkpoint")
    assert logs.count("resuming after") >= 2
