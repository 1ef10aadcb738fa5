"""The errors of the runner, by cause. Each message is one sentence: what is wrong, where, and what is allowed."""

import signal

LONGEST = 200
"""Maximum number of characters of a reason in a message, since the reason may quote the content of a file."""


class QatError(Exception):
    """Base class of errors that end the process with a one-sentence message and `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(QatError):
    """The command cannot be carried out: a wrong key or value, missing data, or weights that do not fit. It is raised
    before any work starts."""

    exit_code = 2


class UnreadableError(ConfigError):
    """A record of a run cannot be read."""


class RunError(QatError):
    """A run that had started could not continue; its records are kept."""


class BusyError(RunError):
    """Another process is working in the run folder."""


class StoppedError(RunError):
    """A signal stopped the run; it was saved, and the same command resumes it."""

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def os_error_message(error: OSError) -> str:
    """Return the message of an OSError: the file or folder, and the reason."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else one_line(error)


def one_line(reason: object) -> str:
    """Return a reason as one line of at most LONGEST printable characters."""
    text = " ".join(str(reason).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
