"""Terminal output of running commands: the messages of the "qat_runner" logger."""

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
    """Prints messages without breaking a progress bar, and discards them once the reader has gone (`| head`)."""

    def __init__(self, level: int, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__(level)
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        file = getattr(sys, self.stream)  # looked up on each call, since a calling program may have replaced it
        try:
            tqdm.write(self.format(record), file=file)
            file.flush()
        except BrokenPipeError:  # harmless: the run's own log has all messages
            silence(file)


@contextmanager
def on_terminal(level: int = logging.INFO, stream: Literal["stdout", "stderr"] = "stdout") -> Iterator[None]:
    """A context in which rank 0 prints messages of `level` and above to a stream; the other ranks print none.

    The logger is restored afterwards, so a program that calls a command's `main` keeps its own handlers.
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
