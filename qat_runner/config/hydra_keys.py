"""Restrictions on Hydra's own config and on interpolations: a command may change almost nothing of them.

The node `hydra` of a config tells Hydra what to import, instantiate, write, and copy from the environment, so a config
from someone else could run code. Therefore a command is checked before it is composed (`check_typed`), and the composed
config is checked before it is used (`check_composed`): apart from the launcher settings in `LAUNCHERS`, the node must
be the one that the shipped configs compose on their own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, OmegaConf

from qat_runner.errors import ConfigError

INTERPOLATIONS = ("${dataset}", "${model}", "${runs_dir}", "${oc.env:QAT_DATA_DIR,data}")
"""The interpolations in the shipped configs, outside of `hydra`."""

FILLED_IN = ("overrides", "runtime", "job.override_dirname")
"""Keys of its own node that Hydra overwrites; it only adds to `overrides`, so those are compared."""

_TARGET = "_target_"
_MOST = 10_000_000
_LINE = re.compile(r"[\w.,:;=@+&|*()\[\] -]*", re.ASCII)  # characters that neither a shell nor Slurm interprets here


@dataclass(frozen=True)
class Kind:
    """A kind of value: how messages describe it, and the test for it."""

    words: str
    fits: Callable[[Any], bool]


_INTEGER = Kind("an integer", lambda value: type(value) is int and abs(value) <= _MOST)
_NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) <= _MOST)
_FLAG = Kind("true or false", lambda value: type(value) is bool)
_ONE = Kind(
    "1, since a row is one process; to use several, start torchrun in a job of your own",
    lambda value: type(value) is int and value == 1,
)
_TEXT = Kind("letters, digits and .,:;=@+&|*()[]-", lambda value: _LINE.fullmatch(str(value)) is not None)


def _settings(
    integers: str = "", numbers: str = "", flags: str = "", texts: str = "", ones: str = ""
) -> dict[str, Kind]:
    kinds = {_INTEGER: integers, _NUMBER: numbers, _FLAG: flags, _TEXT: texts, _ONE: ones}
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


_JOBLIB = _settings(integers="n_jobs verbose", numbers="timeout")
_SUBMITIT = _settings(
    integers="timeout_min cpus_per_task gpus_per_node mem_gb",
    flags="stderr_to_stdout",
    texts="name",
    ones="tasks_per_node nodes",
)
_SLURM = _SUBMITIT | _settings(
    integers="cpus_per_gpu gpus_per_task signal_delay_s max_num_timeout array_parallelism additional_parameters.nice",
    flags="additional_parameters.requeue additional_parameters.exclusive",
    texts="partition qos account comment constraint exclude gres mem_per_gpu mem_per_cpu "
    "additional_parameters.reservation additional_parameters.nodelist additional_parameters.licenses "
    "additional_parameters.begin additional_parameters.mail_type additional_parameters.mail_user",
)
LAUNCHERS: dict[str, tuple[str, Mapping[str, Kind]]] = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher": ("basic", {}),
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher": ("joblib", _JOBLIB),
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher": ("submitit_local", _SUBMITIT),
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher": ("slurm", _SLURM),
}
"""Launcher class -> its option of `hydra/launcher`, and the settings of it that may be changed."""


def check_typed(overrides: Sequence[str], groups: Callable[[str], bool]) -> None:
    """Reject overrides whose mere composition would import code or read files from other folders.

    Args:
        overrides: the overrides as typed.
        groups: returns whether a key is a group of configs.

    Raises:
        ConfigError: an override sets one of Hydra's own keys other than the launcher's, an option that is a path or a
            list, or an interpolation.
        OverrideParseException: Hydra cannot parse an override.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, line = override.key_or_group, override.input_line or ""
        if re.match(r"hydra\b", key) and key != "hydra/launcher" and not key.startswith("hydra.launcher."):
            raise _not_to_be_set(key)
        if groups(key) and ".." in line:
            raise ConfigError(f"{line}: an option is the name of a shipped config, not a path")
        if groups(key) and isinstance(options := override.value(), list):  # Hydra would mix their keys
            sweep = f"{line.partition('=')[0]}={','.join(map(str, options))}"
            raise ConfigError(f"{line}: must be a single option; a sweep is qat-run -m {sweep}")
        _check_interpolations(key, line)


def check_composed(composed: DictConfig, overrides: Sequence[str], own: Callable[[str], Mapping[str, Any]]) -> None:
    """Reject a composed config that differs from the shipped ones in Hydra's own keys, except in allowed settings.

    Args:
        composed: the composed config with its node `hydra`, not resolved.
        overrides: the overrides that it was composed from.
        own: returns, for an option of `hydra/launcher`, the node `hydra` of the shipped configs as plain values.

    Raises:
        ConfigError: a key must not be changed; the message gives the key.
    """
    raw = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(raw, dict)
    node = raw.pop("hydra")
    _check_strings(raw)
    target = node["launcher"].get(_TARGET) if isinstance(node, dict) and isinstance(node.get("launcher"), dict) else ""
    if target not in LAUNCHERS:
        raise _names_code(f"hydra.launcher.{_TARGET}")
    option, settings = LAUNCHERS[target]
    for key, value in _differences(own(option), node):
        setting = key.removeprefix("launcher.")
        if any(key == filled or key.startswith(f"{filled}.") for filled in FILLED_IN):
            continue
        if setting == key:
            raise _not_to_be_set(f"hydra.{key}")
        if setting not in settings:
            allowed = ", ".join(settings) or "none"
            raise ConfigError(f"hydra.{key}: cannot be set; settings of hydra/launcher={option} that can be: {allowed}")
        if value not in (None, MISSING) and not settings[setting].fits(value):
            raise ConfigError(f"hydra.{key}={value}: must be {settings[setting].words}")
    if sorted([*node["overrides"]["hydra"], *node["overrides"]["task"]]) != sorted(overrides):
        raise _not_to_be_set("hydra.overrides")


def _differences(own: Any, other: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys in which a node differs from the shipped one, and their values; MISSING if absent."""
    if not (isinstance(own, Mapping) and isinstance(other, Mapping)):
        return [] if type(own) is type(other) and own == other else [(key, other)]
    keys = sorted(map(str, {*own, *other}))
    prefix = f"{key}." if key else ""
    return [found for k in keys for found in _differences(own.get(k, MISSING), other.get(k, MISSING), f"{prefix}{k}")]


def _check_strings(value: Any, key: str = "") -> None:
    """Reject interpolations and `_target_` anywhere in plain values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == _TARGET:
                raise _names_code(f"{key}.{name}".lstrip("."))
            _check_interpolations(key or str(name), str(name))
            _check_strings(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner, key)
    elif isinstance(value, str):
        _check_interpolations(key, value)


def _check_interpolations(key: str, text: str) -> None:
    for known in INTERPOLATIONS:
        text = text.replace(known, "")
    if "${" in text:
        raise ConfigError(f"{key}: must not contain an interpolation (${{...}}); write the value itself")


def _names_code(key: str) -> ConfigError:
    return ConfigError(f"{key}: a config cannot name code to run")


def _not_to_be_set(key: str) -> ConfigError:
    if key.endswith(_TARGET):
        return _names_code(key)
    return ConfigError(f"{key}: cannot be set; of Hydra's own keys, only hydra/launcher and its settings can be")
