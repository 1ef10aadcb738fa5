"""What can go wrong, by whose fault it is. Each message is one sentence: what was wrong, where, what is allowed."""


class QatError(Exception):
    """Base of the errors that are shown to a user as a sentence, without a traceback; the process ends with
    `exit_code`."""

    exit_code = 1


class ConfigError(QatError):
    """The request cannot be carried out as it stands: a wrong key or value, absent data, weights that do not fit.
    Found before any work."""

    exit_code = 2


class RunError(QatError):
    """A run that had begun could not go on; what it had recorded is kept."""
