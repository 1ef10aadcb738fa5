"""`scripts/benchmark.py gpu` on a CPU: its output, and its behavior when something fails or takes too long."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qat_runner.quant.kernels import set_backend

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = ["gpu", "--device", "cpu", "--tiny", "--rounds", "2"]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    set_backend("auto")
    for name in ("benchmark", "benchmark_gpu", "contests"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_written(tmp_path: Path) -> None:
    import benchmark

    benchmark.main([*TINY, "--only", "vit", "--out", str(tmp_path), "--ways", "eager", "CUDA graph"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"machine", "backend", "rounds", "kernels", "training steps"} == results.keys()
    kernels = results["kernels"]
    assert len(kernels) == 2 * 2 * 12 and all(row["ms"] > 0 and row["x copy"] > 0 for row in kernels)
    without = {row["kernel"] for row in kernels if "of a copy's bandwidth" not in row}
    assert without == {"octav, cold", "remember"} == {row["kernel"] for row in kernels if "GB/s" not in row}
    steps = results["training steps"]
    assert len(steps) == 2 * 3
    for row in steps:
        if row["way"] == "eager":
            assert row["ms"] > 0 and row["launches"] > 100 and row["peak, MiB"] > 0 and "x full precision" in row
        else:
            assert row["error"] == "RuntimeError: a CUDA graph needs a CUDA device"
    text = (tmp_path / "results.md").read_text()
    assert "## kernels" in text and "## training steps" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step() -> None:
    import benchmark
    import benchmark_gpu

    args = benchmark.arguments([*TINY, "--only", "vit"])
    row = benchmark_gpu.figures_of_step(("vit_tiny", 8, 2), "octav", "torch.compile", args, torch.device("cpu"))
    assert row["ms"] > 0 and row["launches"] > 0


def test_what_is_left_out_is_told() -> None:
    import benchmark
    import benchmark_gpu

    args, cpu = benchmark.arguments([*TINY, "--only", "vit"]), torch.device("cpu")
    over = benchmark_gpu.steps(args, cpu, end=time.monotonic())
    assert len(over) == 9 and {row["error"] for row in over} == {"skipped: the 9 minutes are used up"}
    with pytest.raises(benchmark_gpu.TookTooLongError, match="took longer than 0 seconds"), benchmark_gpu.at_most(0.05):
        time.sleep(5)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import benchmark

    with pytest.raises(SystemExit) as stopped:
        benchmark.arguments(["gpu", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "gpu: needs a CUDA device; to check that it works without one" in capsys.readouterr().err
