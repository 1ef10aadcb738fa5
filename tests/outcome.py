"""The complete result of a run, to be compared with that of another run."""

from pathlib import Path
from typing import Any

import torch

from qat_runner.runs.files import CsvFile
from qat_runner.runs.records import LAYERS, METRICS, STEPS, SUMMARY
from qat_runner.training import checkpoint

CLOCK = ("seconds", "samples_per_second")


def result(folder: Path) -> dict[str, Any]:
    """Return everything that a run produced, except for its speed."""
    last = checkpoint.load(folder / "checkpoints" / checkpoint.LAST)
    summary = SUMMARY.read(folder)
    assert summary is not None
    files: tuple[CsvFile[Any], ...] = (METRICS, STEPS, LAYERS)
    tables = {
        file.name: [{key: value for key, value in row.items() if key not in CLOCK} for row in file.read(folder)]
        for file in files
    }
    return {
        "model": last["model"],
        "optimizer": last["optimizer"]["state"],
        "random": [process["random"]["torch"] for process in last["processes"]],
        "summary": {key: value for key, value in summary.items() if key not in (*CLOCK, "run_dir")},
        **tables,
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two results are exactly equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
