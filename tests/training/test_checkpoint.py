import random
from pathlib import Path

import numpy as np
import pytest
import torch

from qat_runner.errors import RunError
from qat_runner.training import checkpoint


def test_random_state_round_trip(tmp_path: Path) -> None:
    checkpoint.seed_everything(5)
    checkpoint.save(tmp_path / "c.pt", {"random": checkpoint.random_state()})
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    checkpoint.set_random_state(checkpoint.load(tmp_path / "c.pt")["random"])
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)) == drawn
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"x": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"c\.pt cannot be read"):
        checkpoint.load(path)
