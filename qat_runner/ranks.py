"""Which process this is of those that torchrun, or something like it, started together, before they meet."""

import os


def world_size() -> int:
    """How many processes torchrun, or something like it, started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether this process is one of several."""
    return world_size() > 1


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process keeps the record."""
    return int(os.environ.get("RANK", "0")) == 0 or not launched()
