"""How the C library handles freed memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees for its next allocations.

    A training step allocates the same large blocks as the previous one. By default, glibc returns each block to the
    system, which then has to allocate and clear every page again: a fifth of the time of a ResNet-18 step on two cores.

    Returns:
        True on success; False on systems without glibc's mallopt.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
