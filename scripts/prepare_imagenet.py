"""ImageNet's class folders from the official tar files in DATA_DIR; interrupted, it goes on where it was.

python scripts/prepare_imagenet.py DATA_DIR
"""

import sys

from qat_runner.data.prepare import main

if __name__ == "__main__":
    sys.exit(main(["imagenet", *sys.argv[1:]]))
