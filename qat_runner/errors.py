"""What can go wrong, by whose fault it is. Each message is one sentence: what was wrong, where, what is allowed."""

import signal

LONGEST = 200
"""Letters of a reason that are told, at most: it may quote what a file holds."""


class QatError(Exception):
    """Base of the errors that end the process with a sentence and `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(QatError):
    """The request cannot be carried out: a wrong key or value, absent data, misfit weights. Found before any work."""

    exit_code = 2


class UnreadableError(ConfigError):
    """What a run recorded cannot be read."""


class RunError(QatError):
    """A run that had begun could not go on; what it had recorded is kept."""


class BusyError(RunError):
    """Another process is at work in the run's folder."""


class StoppedError(RunError):
    """A signal asked the run to stop; it was saved, and goes on from there when asked again."""

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def file_told(error: OSError) -> str:
    """Which file or folder failed, and of what."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else told(error)


def told(reason: object) -> str:
    """A reason in one line of printable letters, and not too many."""
    text = " ".join(str(reason).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
