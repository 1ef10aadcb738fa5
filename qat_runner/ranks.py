"""The rank of this process among those that torchrun, or a similar launcher, started together. No process group is
needed."""

import os


def world_size() -> int:
    """Return how many processes torchrun, or a similar launcher, started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Return whether this process is one of several."""
    return world_size() > 1


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return whether this process is the main one, which writes the run's record."""
    return int(os.environ.get("RANK", "0")) == 0 or not launched()
