"""Download or unpack a data set.

    python -m qat_runner.data.prepare cifar10 DATA_DIR
    python -m qat_runner.data.prepare fashion_mnist DATA_DIR
    python -m qat_runner.data.prepare squad DATA_DIR
    python -m qat_runner.data.prepare imagenet DATA_DIR

For imagenet, DATA_DIR must contain the official files ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz.
"""

import argparse
import sys
from pathlib import Path

from qat_runner.data.sets import DATASETS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qat_runner.data.prepare", description="Download or unpack a data set."
    )
    fetched = {name: dataset.fetch for name, dataset in DATASETS.sound() if dataset.fetch is not None}
    parser.add_argument("dataset", choices=fetched)
    parser.add_argument(
        "data_dir", type=Path, help="folder for the data set; pass the same folder to qat-run as data_dir"
    )
    args = parser.parse_args(argv)
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        fetched[args.dataset](args.data_dir)
    except Exception as error:
        print(f"{args.dataset} could not be prepared in {args.data_dir}: {error}", file=sys.stderr)
        return 1
    print(f"{args.dataset} is ready; use it with: qat-run dataset={args.dataset} data_dir={args.data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
