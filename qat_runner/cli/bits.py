"""qat-bits: choose bits for every weight and activation of a trained network.

    qat-bits model=resnet20 dataset=cifar10 weights=baseline budget=4.0      mean bits of weights and of activations
    qat-bits model=resnet20 dataset=cifar10 weights=baseline size_mb=0.1     or bitops=, traffic_mb=, latency_ms=
    qat-bits model=resnet20 dataset=cifar10 weights=baseline max_drop=0.5    the fewest that cost half a point
    qat-bits -m model=resnet20,resnet56 dataset=cifar10 weights=baseline budget=3,4,5
    qat-run policy=FOLDER/policy.yaml ...                                    trains what came out
    qat-run bits=auto budget=4.0 ...                                         does both

It is qat-run with mode=allocate: all its keys, flags and exit codes hold here as well.
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
            print(f"qat-bits: {arg}: it is mode=allocate here; qat-run has the others", file=sys.stderr)
            return 2
    return run.main(["mode=allocate", *args], "qat-bits")
