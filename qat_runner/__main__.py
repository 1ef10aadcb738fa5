"""`python -m qat_runner`, which is the same as qat-run."""

import sys

from qat_runner.cli import qat_run

if __name__ == "__main__":
    sys.exit(qat_run())
