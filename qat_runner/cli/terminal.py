"""What commands say while they are at work: the messages of the "qat_runner" logger, on the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

from qat_runner import ranks
from qat_runner.cli import silence

log = logging.getLogger("qat_runner")


class _Terminal(logging.Handler):
    """Prints messages so that a progress bar stays whole; to nowhere, once whoever read them has gone (`| head`)."""

    def __init__(self, level: int, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__(level)
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        file = getattr(sys, self.stream)  # as it is now: whoever calls a command may have put another in its place
        try:
            tqdm.write(self.format(record), file=file)
            file.flush()
        except BrokenPipeError:  # which costs no run anything: its log has them all
            silence(file)


@contextmanager
def on_terminal(level: int = logging.INFO, stream: Literal["stdout", "stderr"] = "stdout") -> Iterator[None]:
    """Messages of `level` and above go to a stream, of rank 0 alone; after it the logger is as it was.

    Whoever calls a command's `main` from a program of their own keeps their handlers.
    """
    before = log.handlers, log.level, log.propagate
    log.handlers = [_Terminal(level, stream) if ranks.is_main() else logging.NullHandler()]
    log.propagate = False
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])
