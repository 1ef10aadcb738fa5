"""Asking a run to stop: a signal sets a flag, and the run ends at the next step, saved."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Those that a scheduler sends before it takes a machine away, and Ctrl-C."""


class StopRequest:
    """While open, the first of SIGNALS is noted instead of ending the process; a second Ctrl-C ends it at once.

    Whoever handled the signal before, such as a cluster's launcher that puts the job back into its queue, gets it once
    the run is saved: see `pass_on`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: signals are none of its business
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
        """Give the noted signal to the handler that a launcher had set for it, if any."""
        handler: Callable[..., Any] | int | None = self._before.get(self.signal or 0)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.signal, None)
