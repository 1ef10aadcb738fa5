"""Stopping a run by a signal: the signal sets a flag, and the run saves a checkpoint and ends at the next step."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""The signals that a scheduler sends before it takes a machine away, and SIGINT (Ctrl-C)."""


class StopRequest:
    """Context manager that records the first of SIGNALS instead of letting it end the process.

    A second Ctrl-C ends the process immediately. The handler that was installed before, such as that of a cluster
    launcher that requeues the job, receives the signal after the run is saved: see `pass_on`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, which alone may set handlers
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == number:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def pass_on(self) -> None:
        """Pass the recorded signal to the handler that a launcher had installed for it, if any."""
        handler: Callable[..., Any] | int | None = self._before.get(self.signal or 0)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.signal, None)
