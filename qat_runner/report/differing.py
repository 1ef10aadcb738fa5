"""The settings of runs, the keys in which they differ, and the text of keys and values."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qat_runner.config import Config, settings

DIGITS_OF_HASH = 8
"""Number of digits of a file's fingerprint that are shown."""


class Configured(Protocol):
    """A run."""

    @property
    def config(self) -> Config: ...

    @property
    def processes(self) -> int:
        """The number of processes that trained it, see `processes_of`."""


def processes_of(config: Config, record: Mapping[str, Any]) -> int:
    """Return the number of processes that trained a run; 1 if nothing was trained.

    Args:
        config: its config.
        record: the content of summary.json or environment.json; old ones do not contain the number, which counts as 1.
    """
    return int(record.get("processes", 1)) if config.training else 1


def settings_of(run: Configured) -> dict[str, Any]:
    """Return the settings that determine the result of a run, by dotted key: those of its config, and `processes`."""
    return {**settings(run.config), "processes": run.processes}


def differing_keys(some: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys for which two of the settings that have them differ in value."""
    keys = dict.fromkeys(key for setting in some for key in setting)
    return [key for key in keys if len({str(setting[key]) for setting in some if key in setting}) > 1]


def keys_that_differ(some: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all settings."""
    keys = dict.fromkeys(key for setting in some for key in setting)
    return [key for key in keys if any(setting.get(key) != some[0].get(key) for setting in some)]


def in_words(key: str, value: Any) -> str:
    """Return the text of a key and its value, to follow the name of a method: "lr=0.1"."""
    return f"{key.rpartition('.')[2]}={value_in_words(value)}"


def value_in_words(value: Any) -> str:
    """Return the text of a value; of a fingerprint, only the first digits."""
    text = shown(value)
    hashed = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:DIGITS_OF_HASH]}…" if hashed else text


def shown(value: Any) -> str:
    """Return a config value as a user would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
