"""Print the excess MSE of each way to find clipping scalars over the best scalars, for each integer range, in Markdown.

    python scripts/excess_mse.py                 # rows of normal numbers, a minute on one core
    python scripts/excess_mse.py --rows 2000

The best scalar of each row is found by trying 1,201 candidates, with both signs where scalars have a sign. Refined
scalars can be slightly better, because they may lie between the candidates.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor

from qat_runner.quant import IntFormat, Range, fake_quantize, maximum, mse_sweep, octav, oriented

WAYS: Mapping[str, Callable[[Tensor, IntFormat], Tensor]] = {
    "max": lambda x, f: maximum(x, f, 0),
    "octav, the paper's J": lambda x, f: octav(x, f, 0),
    "octav, missing_code": lambda x, f: octav(x, f, 0, missing_code=True),
    "mse_sweep, each row": lambda x, f: mse_sweep(x, f, 0, together=False),
    **{f"refine={n}": partial(octav, dim=0, missing_code=True, refine=n) for n in (32, 64, 256)},
}


def error(x: Tensor, s: Tensor, format: IntFormat) -> Tensor:
    """Return the squared error of each row of [rows, n]: [rows, 1]."""
    return (fake_quantize(x, s, format) - x).square().sum(1, keepdim=True)


def least(x: Tensor, format: IntFormat) -> Tensor:
    """Return the squared error of each row of [rows, n] with its best scalar: [rows, 1]."""
    top = x.abs().amax(1, keepdim=True)
    best = torch.full_like(top, math.inf)
    for factor in torch.linspace(0.1, 1.3, 1201).tolist():
        for sign in (1, -1) if format.oriented else (1,):
            best = torch.minimum(best, error(x, sign * factor * top, format))
    return best


def excess(x: Tensor, format: IntFormat) -> list[float]:
    """Return the excess of each way, in percent of the least error."""
    best = least(x, format).mean()
    found = []
    for way in WAYS.values():
        s = way(x, format)
        s = oriented(x, s, format) if format.oriented else s
        found.append(100 * (error(x, s, format).mean() / best - 1).item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="rows of normal numbers for each length (default: 400)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    table = []
    for bits in (3, 4, 6, 8):
        for n in (9, 16, 25, 64, 576):
            x = torch.randn(args.rows, n, generator=generator, dtype=torch.float64)
            for kind in Range:
                table.append([bits, n, str(kind), *excess(x, IntFormat(bits, range=kind))])
    print(tabulate(table, ("bits", "elements", "range", *WAYS), tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
