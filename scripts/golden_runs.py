"""Execute about two dozen tiny runs and record their results, to verify that a code change alters no number.

    python scripts/golden_runs.py before.json                       # before the change
    python scripts/golden_runs.py after.json --against before.json  # after it; exit status 1 if anything differs

For each run, the file contains the loss and learning rate of every step, the metrics of every epoch, the noise of every
tensor, the result, the default name of the run, and hashes of each tensor of the last checkpoint and of each exported
file. Times and paths are left out. Results are compared bit by bit, so run both commands on the same machine.
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

UNTRAINED = (
    *("model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("dataset.val_batch_size=32", "clipping.calibration_batches=2"),
)
IMAGES = (*UNTRAINED, "batch_size=16", "epochs=2")
TEXT = (
    *("model=bert", "model.checkpoint=bert", "dataset=squad", "data_dir=data", "dataset.max_length=32"),
    *("dataset.stride=8", "batch_size=8", "epochs=1", "clipping.calibration_batches=1"),
)
EAGER = "backend=eager"
WEIGHTS = "weights=full_precision.pt"
RETRAIN = (*IMAGES, "mode=retrain", WEIGHTS, "recipe=cifar10")

RUNS: Mapping[str, Sequence[str]] = {
    "full_precision": (*IMAGES, "bits=32"),
    "octav": (*IMAGES, EAGER),
    "octav_compiled": (*IMAGES, "clipping.warm_iterations=4"),
    "max_ste": (*IMAGES, EAGER, "clipping=max", "gradient=ste", "bits=3"),
    "percentile_pwl": (*IMAGES, EAGER, "clipping=percentile", "clipping.q=99.9", "gradient=pwl", "bits=5"),
    "mse_sweep_mad": (*IMAGES, EAGER, "clipping=mse_sweep", "clipping.points=20", "gradient=mad"),
    "static_octav": (*RETRAIN, EAGER, "clipping=static_octav", "weight_bits=4", "activation_bits=8"),
    "static_max": (*RETRAIN, EAGER, "clipping=static_max", "conv_granularity=tensor", "linear_granularity=channel"),
    "static_percentile": (*RETRAIN, "clipping=static_percentile", "first_last_bits=4"),
    "static_mse_sweep": (*RETRAIN, "clipping=static_mse_sweep"),
    "lsq": (*RETRAIN, EAGER, "clipping=lsq", "bits=3"),
    "lsq_compiled": (*RETRAIN, "clipping=lsq", "bits=2"),
    "pact": (*IMAGES, EAGER, "clipping=pact", "clipping.alpha=8"),
    "running": (*IMAGES, EAGER, "clipping.eval_mode=running", "model=mobilenet_v2", "model.width=0.5"),
    "frozen": (*IMAGES, EAGER, "recipe.freeze_scalars_at=1"),
    "accumulate": (*IMAGES, EAGER, "accumulate=4", "log_excess_mse=true"),
    "resumed": (*IMAGES, EAGER, "epochs=6", "seed=3"),
    "ptq": (*UNTRAINED, EAGER, "mode=ptq", WEIGHTS, "quantize_head=false"),
    "retrain": (*RETRAIN, EAGER, "recipe.distill=full_precision"),
    "evaluate": (*UNTRAINED, EAGER, "mode=evaluate", "weights=octav.pt"),
    "two_processes": (*IMAGES, EAGER, "clipping.sync=true"),
    "bert": (*TEXT, EAGER),
    "bert_static": (*TEXT, EAGER, "clipping=static_octav", "bits=6"),
}
NEEDED = ("full_precision", "octav")
"""Runs whose weights other runs start from."""
EXPORTED = ("octav", "static_octav", "lsq", "pact", "frozen", "bert_static")
NOT_NUMBERS = ("seconds", "samples_per_second", "train_seconds", "run_dir")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="file to write the results to")
    parser.add_argument("--against", type=Path, help="results of the code before the change")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), help="names of the runs to execute (default: all)"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(carried_out(Path(folder), asked.only))
    asked.file.write_text(json.dumps(found, indent=1) + "\n")
    if asked.against is None:
        return 0
    before = json.loads(asked.against.read_text())
    absent = [name for name in asked.only if name not in before]
    print("".join(f"{name:20} is not in {asked.against}\n" for name in absent), end="")
    return compared(before, found) or int(bool(absent))


def compared(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print one line per run, with the number of values and of differences; return the exit status."""
    bad = 0
    for name in (name for name in before if name in after):
        then, now = dict(leaves(before[name])), dict(leaves(after[name]))
        differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        verdict = f"{len(differing)} DIFFER, first {differing[0]}" if differing else "equal"
        print(f"{name:20} {len(then):6} values  {verdict}")
        bad += bool(differing)
    return int(bad > 0)


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each leaf of nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, f"{where}/{key}")
    else:
        yield where, value


def carried_out(folder: Path, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Execute the runs, and yield the name and the results of each; runs that others need come first."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import tiny_bert, tiny_squad

    tiny_bert(folder / "bert")
    tiny_squad(folder / "data" / "squad")
    for name, args in RUNS.items():
        if name not in (*wanted, *NEEDED):
            continue
        command = ["-m", "qat_runner", *args, f"runs_dir=runs/{name}"]
        if name == "two_processes":
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
        if name == "resumed":
            stopped_after(folder / "runs" / name, 5, command, folder)
        called(command, folder)
        (run,) = (folder / "runs" / name).iterdir()
        if name in NEEDED:
            torch.save(torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"], folder / f"{name}.pt")
        if name in EXPORTED:
            called(["-m", "qat_runner.cli.export", str(run), "--formats", "safetensors", "onnx"], folder)
        yield name, {"name": run.name, **left(run)}
        print(f"{name} done", file=sys.stderr)


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QAT_CACHE_DIR": str(folder / "cache")}


def called(command: Sequence[str], folder: Path) -> str:
    """Run this Python with the arguments and return its output.

    Raises:
        RuntimeError: the command failed.
    """
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(folder), capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def stopped_after(runs: Path, rows: int, command: Sequence[str], folder: Path) -> None:
    """Start a run, and stop it once its steps.csv has the given number of rows."""

    def recorded() -> int:
        return sum(path.read_text().count("\n") for path in runs.glob("*/steps.csv"))

    run = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL)
    while run.poll() is None and recorded() <= rows:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    run.wait()


def left(folder: Path) -> dict[str, Any]:
    """Return everything that a run left in its folder, except times and paths."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "tensorboard" not in str(p))
    summary = json.loads((folder / "summary.json").read_text())
    found: dict[str, Any] = {"files": files, "summary": without_times(summary)}
    for name in ("steps.csv", "metrics.csv", "layers.csv"):
        if (folder / name).is_file():
            with open(folder / name, newline="") as file:
                found[name] = [without_times(row) for row in csv.DictReader(file)]
    for name in ("quantizers.txt", "histograms.json", "predictions.json"):
        if (folder / name).is_file():
            found[name] = hashed((folder / name).read_bytes())
    last = folder / "checkpoints" / "last.pt"
    if last.is_file():
        saved = torch.load(last, weights_only=True)
        found["weights"] = {key: hashed(tensor.numpy().tobytes()) for key, tensor in saved["model"].items()}
        found["identity"] = saved["config"]
    for path in sorted(folder.glob("export/*")):
        if path.suffix in (".safetensors", ".onnx"):
            found[path.name] = hashed(path.read_bytes())
    return found


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NOT_NUMBERS}


def hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
