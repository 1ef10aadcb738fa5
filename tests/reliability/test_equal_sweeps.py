"""Identical concurrent sweeps: each row is carried out once, and all sweeps succeed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability
SWEEP = [
    *("-m", "backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=32", "epochs=1", "noise_batches=0", "seed=0,1,2"),
]


def test_five_equal_sweeps(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qat_runner", *SWEEP]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sweeps = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(5)
    ]
    text = [sweep.communicate()[1].decode() for sweep in sweeps]
    print([sweep.returncode for sweep in sweeps])
    assert [sweep.returncode for sweep in sweeps] == [0] * 5, text
    folders = [path.parent for path in (tmp_path / "runs").glob("*/summary.json")]
    assert len(folders) == 3
    for folder in folders:
        assert (folder / "log.txt").read_text().count("epoch 1/1") == 1
