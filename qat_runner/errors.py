"""What can go wrong, by whose fault it is. Each message is one sentence: what was wrong, where, what is allowed."""


class QatError(Exception):
    """Base of the errors that end the process with a sentence and `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(QatError):
    """The request cannot be carried out: a wrong key or value, absent data, misfit weights. Found before any work."""

    exit_code = 2


class RunError(QatError):
    """A run that had begun could not go on; what it had recorded is kept."""
