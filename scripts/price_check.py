"""Check how well prices (estimated sensitivities) predict the loss, by pricing and measuring random policies.

    python scripts/price_check.py model=resnet20 dataset=cifar10 data_dir=/data weights=resnet20.th
    python scripts/price_check.py --policies 100 --samples 2000 --csv prices.csv model=... weights=...

The keys are those of qat-bits. There are two kinds of policies: arbitrary bit-widths from a random range for each
tensor; and 3 to 6 bits with an average of 4, for weights as well as for activations, as a budget would enforce. For
each kind of price, the script prints Spearman's rank correlation between the predicted and the measured increase of the
loss on validation data. With --against, it also compares what each kind of price chooses at that average bit-width with
random policies of the same average.
"""

import argparse
import csv
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from scipy.stats import spearmanr
from tabulate import tabulate

from qat_runner.allocation import Limit, Network, Operand, allocate_bits, network, price
from qat_runner.allocation.costs import mean_bits
from qat_runner.allocation.prices import quantized_to
from qat_runner.cli.explain import explain
from qat_runner.config import BASELINE, Config, config_dir, from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.errors import QatError
from qat_runner.experiment.building import CALIBRATION_EPOCH, EXAMPLE, build
from qat_runner.experiment.checks import preflight
from qat_runner.policy import PRICES
from qat_runner.tasks import task_of

MEAN = 4.0
"""Average bit-width of the policies that have a budget."""

CLOSE = 0.05
"""How far below that average is close enough, in bits."""

STEPS = 10_000
"""The largest number of changes of single bit-widths when looking for a policy."""


def any_bits(known: Network, widths: list[int], draw: random.Random) -> dict[str, int]:
    """Draw a bit-width for each tensor from a range that is drawn first, so that policies of all averages occur."""
    low, high = sorted(draw.sample(range(len(widths)), 2))
    return {operand.name: draw.choice(widths[low : high + 1]) for operand in known.free}


def bits_of_budget(known: Network, widths: list[int], draw: random.Random) -> dict[str, int]:
    """Draw bit-widths from 3 to 6 with an average of `MEAN` or just below, for weights and for activations.

    The average is over the elements. If the tensors are too few to reach this, the result is the closest policy within
    `STEPS` changes.
    """
    widths = widths_of_budget(widths)
    bits: dict[str, int] = {}
    for weights in (True, False):
        operands = [operand for operand in known.free if operand.weight == weights]
        if operands:
            bits |= near_the_mean(operands, widths, draw)
    return bits


def widths_of_budget(widths: list[int]) -> list[int]:
    """Return the bit-widths for policies with a budget; empty if they cannot average to `MEAN`."""
    some = [width for width in widths if 3 <= width <= 6]
    return some if some and min(some) < MEAN < max(some) else []


def near_the_mean(operands: list[Operand], widths: list[int], draw: random.Random) -> dict[str, int]:
    """Draw bit-widths for tensors of one kind, and change one at a time until the average is `MEAN` or just below."""
    total = sum(operand.elements for operand in operands)
    bits = {operand.name: draw.choice(widths) for operand in operands}
    best, least = bits, math.inf
    for _ in range(STEPS):
        over = sum(o.elements * bits[o.name] for o in operands) / total - MEAN
        if over <= 0 and -over < least:
            best, least = dict(bits), -over
        if least <= CLOSE:
            break
        operand = draw.choice(operands)
        at = widths.index(bits[operand.name]) + (-1 if over > 0 else 1)
        bits[operand.name] = widths[min(max(at, 0), len(widths) - 1)]
    return best


@dataclass
class Subject:
    """A network, its prices, and a function that measures its loss."""

    known: Network
    widths: list[int]
    prices: Mapping[str, Mapping[str, Mapping[int, float]]]
    """kind of price -> tensor -> bit-width -> price"""
    measured: Callable[[dict[str, int]], float]
    """policy -> increase of the loss"""


def priced(config: Config, samples: int) -> Subject:
    """Build the network of a config and compute its prices of every kind."""
    model, data = build(config, config.weights)
    known, task, how = network(model, config.allocation.widths, EXAMPLE), task_of(config), config.allocation

    objective = task.objective()
    batches = list(data.train_batches(how.batch_size, CALIBRATION_EPOCH, how.batches))
    prices = {}
    for kind in PRICES:
        began = time.perf_counter()
        prices[kind] = price(model, batches, objective, how.widths, kind).mean()
        print(f"{kind}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    others = list(
        itertools.islice(data.val_batches(config.dataset.val_batch_size), -(-samples // config.dataset.val_batch_size))
    )

    @torch.no_grad()
    def loss(bits: dict[str, int]) -> float:
        with quantized_to(model, bits):
            return sum(float(task.loss(task.compute(model, b.inputs), b.targets)) for b in others) / len(others)

    plain = loss({})
    return Subject(known, sorted(how.widths), prices, lambda bits: loss(bits) - plain)


def checked(subject: Subject, policies: int, draw: random.Random) -> list[dict[str, Any]]:
    """Return one row per policy: its kind, the prediction of each kind of price, and the increase of the loss."""
    rows = []
    for kind, drawn in (("any", any_bits), (f"mean {MEAN:g}", bits_of_budget)):
        for _ in range(policies):
            bits = drawn(subject.known, subject.widths, draw)
            foretold = {
                name: sum(table[tensor][width] for tensor, width in bits.items())
                for name, table in subject.prices.items()
            }
            rows.append({"policies": kind, **foretold, "rise": subject.measured(bits)})
    return rows


def compared(subject: Subject, policies: int, draw: random.Random) -> list[dict[str, Any]]:
    """Return one row per kind of price, for its choice at an average of `MEAN` bits.

    A row has the increase of the loss, and the share of random policies of the same average with a larger increase.
    """
    rivals = [subject.measured(bits_of_budget(subject.known, subject.widths, draw)) for _ in range(policies)]
    limits = [Limit(measure, MEAN) for measure in mean_bits(subject.known)]
    rows = []
    for kind, prices in subject.prices.items():
        rise = subject.measured(dict(allocate_bits(subject.known, prices, limits).bits))
        better = 100 * sum(rise < rival for rival in rivals) / policies
        rows.append({"chosen by": kind, "rise": rise, "better than %": better, "best of random": min(rivals)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=40, help="number of policies of each kind")
    parser.add_argument(
        "--against", type=int, default=0, help="number of random policies to compare each price's choice with"
    )
    parser.add_argument("--samples", type=int, default=1000, help="number of samples to measure losses on")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the policies")
    parser.add_argument("--csv", type=Path, help="file to write one row per policy to")
    asked, keys = parser.parse_known_args()
    try:
        config = from_hydra(compose_config(["mode=allocate", "budget=4", *keys]))
        if config.weights == BASELINE:
            parser.error("weights=baseline: must be a weights file, such as the last checkpoint of a run")
        preflight(config)
    except (HydraException, OmegaConfBaseException) as error:
        parser.error(explain(error, config_dir()))
    except QatError as error:
        parser.error(str(error))
    if not widths_of_budget(sorted(config.allocation.widths)):
        parser.error(f"allocation.widths: must contain bit-widths on both sides of {MEAN:g}, from 3 to 6")
    subject, draw = priced(config, asked.samples), random.Random(asked.seed)
    rows = checked(subject, asked.policies, draw)
    if asked.csv is not None:
        with asked.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    table = []
    for kind in dict.fromkeys(row["policies"] for row in rows):
        some = [row for row in rows if row["policies"] == kind]
        found = {name: spearmanr([r[name] for r in some], [r["rise"] for r in some]).statistic for name in PRICES}
        table.append({"policies": f"{len(some)} of {kind} bits", **found})
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".2f"))
    if asked.against:
        print(
            f"\n{tabulate(compared(subject, asked.against, draw), headers='keys', tablefmt='github', floatfmt='.3f')}"
        )


if __name__ == "__main__":
    main()
