"""Compare learned clipping scalars with MSE-optimal ones, and the accuracy with either: two Markdown tables.

    python scripts/learned_distance.py runs/NAME
    python scripts/learned_distance.py runs/NAME --batches 4 --csv distance.csv

The first table has a row for each tensor of a run with clipping=lsq or pact, measured on the same training batches in
the trained, quantized network:

- the learned scalar s;
- s*, the scalar with the least squared error according to OCTAV, which here accounts for the missing code and measures
  candidates (with --paper: OCTAV as published);
- s / s*, the geometric mean over the scalars of the tensor; for two clipping bounds, the ratio of their distances;
- the MSE at both.

The second table has the validation metrics of the network as it is, and with the scalars of weights, of activations or
of both moved to s*, each before and after the statistics of BatchNorm are re-estimated. With pact, weights have no
learned scalars (DoReFa's are a maximum), so only activations are moved.
"""

import argparse
import copy
import csv
import logging
import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from qat_runner.config import Amp, Config
from qat_runner.data import Data
from qat_runner.errors import ConfigError, QatError
from qat_runner.experiment import CALIBRATION_EPOCH
from qat_runner.exporting.run_export import network_of
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.watch import watch
from qat_runner.quant import Call, Format, IntFormat, LearnedQuantizer, Octav, Quantizer, measure, oriented
from qat_runner.tasks import task_of
from qat_runner.training.batch_norm import norms, reestimate
from qat_runner.training.measure import evaluate

MOVED: Mapping[str, tuple[bool, ...]] = {"none": (), "weights": (True,), "activations": (False,), "both": (True, False)}
"""What is moved -> which tensors that is: weights (True), others (False), or both."""


@dataclass(frozen=True)
class Distance:
    """A row of the first table."""

    tensor: str
    bits: int
    scalars: int
    s: float
    """in units of the tensor; mean over its scalars"""
    best_s: float
    ratio: float
    mse: float
    """in squared units of the tensor"""
    best_mse: float
    excess_percent: float


def learned(model: nn.Module) -> dict[str, tuple[bool, LearnedQuantizer]]:
    """Return name -> (whether it is a weight, quantizer) of the tensors whose scalars are parameters."""
    tensors = {t.name: (t.tensor == "weight", t.quantizer) for t in quantized_tensors(model)}
    return {name: (weight, q) for name, (weight, q) in tensors.items() if isinstance(q, LearnedQuantizer)}


def compared(model: nn.Module, inputs: Iterable[Any], octav: Octav) -> tuple[list[Distance], dict[str, Tensor]]:
    """Return the rows of the table, and the best scalars of each tensor in its shape; both are means over batches."""
    names = {q: name for name, (_, q) in learned(model).items()}
    found: dict[LearnedQuantizer, list[tuple[Tensor, Tensor]]] = {}

    def look(q: Quantizer, x: Tensor) -> None:
        if isinstance(q, LearnedQuantizer):
            best = octav.solve(x, q.format, q.dim, Call())
            if isinstance(q.format, IntFormat) and q.format.oriented:
                best = oriented(x, best, q.format)
            noises = [measure(x, s, q.format).mse for s in (q.latest(), best)]
            found.setdefault(q, []).append((best.reshape(q.s.shape), torch.stack(noises)))

    watch(model, inputs, look)
    means = {q: [torch.stack(part) for part in zip(*pairs, strict=True)] for q, pairs in found.items()}
    best = {q: torch.copysign(s.abs().mean(0), s.sign().sum(0)) for q, (s, _) in means.items()}
    rows = [distance(names[q], q, best[q], *noises.mean(0).tolist()) for q, (_, noises) in means.items()]
    return rows, {names[q]: s for q, s in best.items()}


def distance(name: str, q: LearnedQuantizer, best: Tensor, mse: float, best_mse: float) -> Distance:
    """Return a row of the table."""
    ours, theirs = (width(q.format, s) for s in (q.latest(), best))
    ratio = (ours / theirs).log().mean().exp().item()
    figures = ours.mean().item(), theirs.mean().item(), ratio, mse, best_mse
    return Distance(name, q.format.bits, ours.numel(), *figures, 100 * (mse / best_mse - 1) if best_mse else 0.0)


def width(format: Format, s: Tensor) -> Tensor:
    """Return how far scalars reach, or the distance between two clipping bounds; never 0."""
    reach = format.reach(s) if format.parts == 1 else s[1] - s[0]
    return reach.double().clamp(min=torch.finfo(torch.float32).tiny)


def moved(model: nn.Module, best: Mapping[str, Tensor], weights: Container[bool]) -> nn.Module:
    """Return a copy of a network with the best instead of the learned scalars, for weights, other tensors or both."""
    model = copy.deepcopy(model)
    for name, (weight, quantizer) in learned(model).items():
        if weight in weights and name in best:
            quantizer.assign(best[name])
    return model


def validated(model: nn.Module, config: Config, data: Data) -> dict[str, float]:
    """Return the metrics of a validation pass."""
    task = task_of(config)
    totals = task.score(data)
    batches = data.val_batches(config.dataset.val_batch_size, config.limit_val_batches)
    evaluate(task, model, batches, totals, Amp.none)
    return {name: value for name, value in totals.read().items() if name != "samples"}


def report(args: argparse.Namespace) -> tuple[list[Distance], list[dict[str, Any]]]:
    """Return the rows of both tables.

    Raises:
        ConfigError: there is no such run, or it has no learned scalars.
    """
    model, data, config = network_of(args.run, args.checkpoint)
    if not learned(model):
        raise ConfigError(f"{args.run}: has no learned scalars; it must be a run with clipping=lsq or clipping=pact")

    octav = Octav() if args.paper else Octav(missing_code=True, refine=64)
    some = data.train_batches(config.clipping.calibration_batch_size, CALIBRATION_EPOCH, args.batches)
    rows, best = compared(model, (batch.inputs for batch in some), octav)
    figures: list[dict[str, Any]] = []
    kinds = {weight for weight, _ in learned(model).values()}
    for what, weights in MOVED.items():
        if not kinds.issuperset(weights):
            continue
        network = moved(model, best, weights)
        figures.append({"moved": what, "BatchNorm": "as trained", **validated(network, config, data)})
        if norms(network):
            anew = data.train_batches(config.batch_size, CALIBRATION_EPOCH, args.norm_batches)
            reestimate(network, anew, task_of(config).compute)
            figures.append({"moved": what, "BatchNorm": "re-estimated", **validated(network, config, data)})
    return rows, figures


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with clipping=lsq or pact")
    parser.add_argument(
        "--batches", type=int, default=1, help="number of batches over which s* is averaged (default: 1)"
    )
    parser.add_argument(
        "--norm-batches", type=int, default=50, help="number of batches for re-estimating BatchNorm (default: 50)"
    )
    parser.add_argument("--paper", action="store_true", help="use OCTAV as published")
    parser.add_argument(
        "--checkpoint", choices=("last", "previous", "best"), default="last", help="checkpoint to use (default: last)"
    )
    parser.add_argument("--csv", type=Path, help="file to write the first table to")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        rows, figures = report(args)
    except QatError as error:
        print(f"learned_distance: {error}", file=sys.stderr)
        return error.exit_code
    table = [asdict(row) for row in rows]
    if args.csv is not None:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".4g"), end="\n\n")
    print(tabulate(figures, headers="keys", tablefmt="github", floatfmt=".4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
