"""The config of a run as a table, by section, beside the defaults."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qat_runner.config import Config, flat, from_hydra, plain
from qat_runner.config.composing import compose_config, defaults_for
from qat_runner.config.identities import NOT_IN_IDENTITY
from qat_runner.report.differing import shown

_CHOICES = {"model.name", "dataset.name", "clipping.name", "clipping.dynamic", "gradient.name", "bits", "mode"}
"""Keys whose default is that of plain `qat-run`; the defaults of all other keys follow from these."""

_HIDDEN = ("fingerprints", "sweep", "standins")


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    key: str
    """name within its group"""
    value: str
    default: str
    changed: bool


def sections(config: Config) -> list[tuple[str, list[Setting]]]:
    """Return (title, rows) for the keys of the run itself, those of each group, and paths, which change no result.

    Args:
        config: a resolved config.
    """
    own, default, bare = (plain(c) for c in (config, defaults_for(config), from_hydra(compose_config([]))))
    groups = [key for key, value in own.items() if isinstance(value, dict) and key not in _HIDDEN]
    places = [key for key in NOT_IN_IDENTITY if key not in _HIDDEN]
    run = [key for key in own if key not in (*groups, *NOT_IN_IDENTITY)]
    tables = [("run", run), *((group, [group]) for group in groups), ("paths and bookkeeping", places)]
    flattened = flat(default) | {key: value for key, value in flat(bare).items() if key in _CHOICES}
    return [(title, list(_rows({key: own[key] for key in keys}, flattened))) for title, keys in tables]


def _rows(own: dict[str, Any], default: dict[str, Any]) -> Iterator[Setting]:
    for key, value in flat(own).items():
        group, _, rest = key.partition(".")
        changed = group not in NOT_IN_IDENTITY and value != default.get(key)
        yield Setting(rest or key, shown(value), shown(default.get(key)), changed)
