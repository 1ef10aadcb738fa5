"""python -m qat_runner: the same as qat-run."""

import sys

from qat_runner.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
