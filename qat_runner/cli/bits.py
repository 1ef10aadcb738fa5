"""qat-bits: choose a bit-width for every weight and activation of a trained network.

    qat-bits model=resnet20 dataset=cifar10 weights=baseline budget=4.0      average bits of weights, and of activations
    qat-bits model=resnet20 dataset=cifar10 weights=baseline size_mb=0.1     or bitops=, traffic_mb=, latency_ms=
    qat-bits model=resnet20 dataset=cifar10 weights=baseline max_drop=0.5    the cheapest that lose at most half a point
    qat-bits -m model=resnet20,resnet56 dataset=cifar10 weights=baseline budget=3,4,5
    qat-run policy=FOLDER/policy.yaml ...                                    trains with the chosen bit-widths
    qat-run bits=auto budget=4.0 ...                                         does both

It is qat-run with mode=allocate: all keys, flags and exit codes of qat-run apply.
"""

import sys
from collections.abc import Sequence

from qat_runner.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--help" in args or "-h" in args:
        print(__doc__)
    for arg in args:
        if arg.lstrip("+").startswith("mode=") and arg != "mode=allocate":
            print(f"qat-bits: {arg}: must be mode=allocate; use qat-run for other modes", file=sys.stderr)
            return 2
    return run.main(["mode=allocate", *args], "qat-bits")
