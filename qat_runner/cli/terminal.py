"""What commands say while they are at work: the messages of the "qat_runner" logger, on the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from qat_runner import distributed

log = logging.getLogger("qat_runner")


class _Terminal(logging.Handler):
    """Prints messages so that a progress bar stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def on_terminal(level: int = logging.INFO) -> Iterator[None]:
    """Messages of `level` and above go to stdout, of rank 0 alone; after it the logger is as it was.

    Whoever calls a command's `main` from a program of their own keeps their handlers.
    """
    before = log.handlers, log.level, log.propagate
    log.handlers = [_Terminal(level) if distributed.is_main() else logging.NullHandler()]
    log.propagate = False
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])
