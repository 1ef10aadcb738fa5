"""How well prices of bits foretell the loss: random policies, priced and measured.

    python scripts/price_check.py model=resnet20 dataset=cifar10 data_dir=/data weights=resnet20.th
    python scripts/price_check.py --policies 100 --samples 2000 --csv prices.csv model=... weights=...

Keys are those of qat-bits. Policies are of two kinds: any bits from a random range for each tensor; and 3 to 6 bits
whose mean is 4, for weights as for activations, to which a budget restricts the choice. For each kind of price:
Spearman's rank correlation of the foretold and the measured rise of the loss, on validation data. With --against,
what each kind chooses at that mean, beside random policies that come to it.
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
from qat_runner.allocation.prices import having_bits
from qat_runner.cli.explain import explain
from qat_runner.config import BASELINE, Config, config_dir, from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.errors import QatError
from qat_runner.experiment.building import CALIBRATION_EPOCH, EXAMPLE, build
from qat_runner.experiment.checks import preflight
from qat_runner.policy import PRICES
from qat_runner.tasks import task_of

MEAN = 4.0
"""Bits of the policies that have a budget."""

CLOSE = 0.05
"""Bits below that mean that are close enough."""

STEPS = 10_000
"""Changes of one width after which it is left at that."""


def any_bits(known: Network, widths: list[int], draw: random.Random) -> dict[str, int]:
    """For each tensor any of the widths in a range that is drawn first, so that policies of all means occur."""
    low, high = sorted(draw.sample(range(len(widths)), 2))
    return {operand.name: draw.choice(widths[low : high + 1]) for operand in known.free}


def bits_of_budget(known: Network, widths: list[int], draw: random.Random) -> dict[str, int]:
    """Random widths, 3 to 6, whose mean over the elements, of weights and of activations, is `MEAN` or just below.

    Where few tensors do not come to that, it is as near as `STEPS` changes of one width get it.
    """
    widths = widths_of_budget(widths)
    bits: dict[str, int] = {}
    for weights in (True, False):
        operands = [operand for operand in known.free if operand.weight == weights]
        if operands:
            bits |= near_the_mean(operands, widths, draw)
    return bits


def widths_of_budget(widths: list[int]) -> list[int]:
    """Those that policies which have a budget are drawn from; empty where none can come to `MEAN`."""
    some = [width for width in widths if 3 <= width <= 6]
    return some if some and min(some) < MEAN < max(some) else []


def near_the_mean(operands: list[Operand], widths: list[int], draw: random.Random) -> dict[str, int]:
    """Random widths of tensors of one kind, changed one by one until their mean is `MEAN` or just below."""
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
    """A network, its prices, and what its loss is measured on."""

    known: Network
    widths: list[int]
    prices: Mapping[str, Mapping[str, Mapping[int, float]]]
    """by kind"""
    measured: Callable[[dict[str, int]], float]
    """the rise of the loss with so many bits for each tensor"""


def priced(config: Config, samples: int) -> Subject:
    """The network of a config, priced in every way."""
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
        with having_bits(model, bits):
            return sum(float(task.loss(task.compute(model, b.inputs), b.targets)) for b in others) / len(others)

    plain = loss({})
    return Subject(known, sorted(how.widths), prices, lambda bits: loss(bits) - plain)


def checked(subject: Subject, policies: int, draw: random.Random) -> list[dict[str, Any]]:
    """A row a policy: its kind, what each price foretells, and the rise of the loss."""
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
    """A row a kind of price: the rise of the loss with what it chooses at a mean of `MEAN` bits, and which share of so
    many random policies of that mean it is below."""
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
    parser.add_argument("--policies", type=int, default=40, help="of each kind")
    parser.add_argument(
        "--against", type=int, default=0, help="random policies that each price's choice is held against"
    )
    parser.add_argument("--samples", type=int, default=1000, help="that losses are measured on")
    parser.add_argument("--seed", type=int, default=0, help="of the policies")
    parser.add_argument("--csv", type=Path, help="file for a row a policy")
    asked, keys = parser.parse_known_args()
    try:
        config = from_hydra(compose_config(["mode=allocate", "budget=4", *keys]))
        if config.weights == BASELINE:
            parser.error("weights=baseline: needs a file of weights, such as that of the run's last checkpoint")
        preflight(config)
    except (HydraException, OmegaConfBaseException) as error:
        parser.error(explain(error, config_dir()))
    except QatError as error:
        parser.error(str(error))
    if not widths_of_budget(sorted(config.allocation.widths)):
        parser.error(f"allocation.widths: must have one below {MEAN:g} and one above it, of 3 to 6")
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
