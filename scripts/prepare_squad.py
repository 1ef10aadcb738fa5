"""SQuAD v1.1's two files, downloaded to DATA_DIR and checked; what is there already is kept.

python scripts/prepare_squad.py DATA_DIR
"""

import sys

from qat_runner.data.prepare import main

if __name__ == "__main__":
    sys.exit(main(["squad", *sys.argv[1:]]))
