"""Composing the shipped configs, and the reverse: finding the command that produces a given config."""

import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from qat_runner.config import hydra_keys
from qat_runner.config.allowed import NOT_TYPED
from qat_runner.config.groups import GROUP, config_dir, options_in_code, register
from qat_runner.config.identities import NOT_IN_IDENTITY, OF_QUANTIZATION, differences, flat, identity
from qat_runner.config.keys import plain
from qat_runner.config.model_names import register_model_names, split_model_name
from qat_runner.config.resolving import from_hydra, scaled_lr
from qat_runner.config.schema import AUTO, OF_STAGE, Config, Mode
from qat_runner.errors import ConfigError
from qat_runner.plugins import installed

HYDRA_VERSION_BASE = "1.3"

_PREPROCESSING = tuple(f"dataset.{key}" for key in ("image_size", "mean", "std", "interpolation", "resize_size"))
"""Keys that dataset.preprocessing=model takes from the model unless the command sets them."""


@contextmanager
def shipped_configs() -> Iterator[None]:
    """A context in which Hydra composes from the shipped configs and those of installed packages."""
    register()
    with initialize_config_dir(str(config_dir()), version_base=HYDRA_VERSION_BASE):
        yield


def compose_checked(overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """Compose a config within `shipped_configs`, and check that it sets only the keys of a run.

    Args:
        overrides: the overrides of one row; in mode MULTIRUN those of a whole sweep, from which its launcher is made.

    Returns:
        The composed config, not resolved yet.

    Raises:
        ConfigError: the config sets a forbidden key (see `hydra_keys`), or cannot be composed.
        HydraException, OmegaConfBaseException: the config cannot be composed.
    """
    hydra_keys.check_typed(overrides, lambda key: (config_dir() / key).is_dir())
    register_model_names(overrides, config_dir())
    try:
        composed = _compose(overrides, mode)
    except AssertionError as error:  # an assertion of Hydra fails on a key inside a group that is null
        stages = ", ".join(override for override in overrides if override.startswith("recipe."))
        raise ConfigError(f"{stages}: the recipe has no such stage") from error
    except ValueError as error:  # some errors of Hydra are not a HydraException
        raise ConfigError(" ".join(str(error).split())) from error
    hydra_keys.check_composed(composed, overrides, _hydra_node)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _compose(overrides: Sequence[str], mode: RunMode) -> DictConfig:
    """Compose a config including the node `hydra`. `hydra.compose` would not check this node, nor handle sweeps."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra.compose_config(
        "config", list(overrides), run_mode=mode, from_shell=False, with_log_configuration=False
    )


def composed_launcher(overrides: Sequence[str]) -> tuple[DictConfig, ConfigLoader]:
    """Return what a launcher is made from, within `shipped_configs`: the config of a sweep, and the loader that
    composes its rows.

    Args:
        overrides: the overrides of the sweep, already checked by `compose_checked`.
    """
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return _compose(overrides, RunMode.MULTIRUN), hydra.config_loader


@functools.cache
def _hydra_node(launcher: str) -> Mapping[str, Any]:
    """The node `hydra` of the shipped configs with a given option of `hydra/launcher`."""
    node = OmegaConf.to_container(_compose([f"hydra/launcher={launcher}"], RunMode.RUN).hydra, resolve=False)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Return the config that `qat-run OVERRIDES` composes, read-only and not resolved yet.

    Raises:
        As `compose_checked`.
    """
    return _composed(tuple(overrides), (options_in_code(), *installed(GROUP)))


@functools.cache
def _composed(overrides: tuple[str, ...], options: object) -> DictConfig:
    """`compose_config`, cached while the `options` from outside the shipped files stay the same: HTML reports compose
    the same configs again and again, and Hydra takes a twentieth of a second for each."""
    with shipped_configs():
        composed = compose_checked([*map(freed, overrides), *given(overrides)])
    OmegaConf.set_readonly(composed, True)
    return composed


def freed(override: str) -> str:
    """Return an override in the form that Hydra requires. Options of a method or estimator are not in the schema, so
    they need the prefix ++; the method itself checks them."""
    return f"++{override}" if override.startswith(("clipping.options", "gradient.options")) else override


def given(overrides: Sequence[str]) -> list[str]:
    """Return the override that lists the preprocessing keys among the given overrides, or nothing if there are none.

    Raises:
        ConfigError: an override sets a key that a command cannot set.
        OverrideParseException: Hydra cannot parse an override.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for name in (override.key_or_group.partition(".")[0] for override in parsed):
        if name in NOT_TYPED:
            raise ConfigError(f"{name}: {NOT_TYPED[name]}")
    keys = [key for key in _PREPROCESSING if key in {override.key_or_group for override in parsed}]
    return [f"given={quoted(keys)}"] if keys else []


def choices(config: Config) -> list[str]:
    """Return the main overrides of a resolved config: groups whose option is shipped, bit-widths or the limits that
    they are chosen by, mode and weights.
    """
    static = not config.clipping.dynamic and not config.clipping.learned
    wanted = {"model": config.model.name, "dataset": config.dataset.name}
    if config.recipe.name != config.dataset.name:
        wanted["recipe"] = config.recipe.name
    if not config.quantization.full_precision:
        wanted["clipping"] = ("static_" if static else "") + config.clipping.name
        wanted["gradient"] = config.gradient.name
    groups = [f"{group}={quoted(name)}" for group, name in wanted.items() if _is_option(group, name)]
    bits = [f"bits={config.weight_bits if config.weight_bits == config.activation_bits else config.bits}"]
    if config.allocating:
        asked = config.limits | {"max_drop": config.max_drop, "allocation.latencies": config.allocation.latencies}
        bits = ["policy=auto"] if config.policy == AUTO else []
        bits += [f"{key}={quoted(value)}" for key, value in asked.items() if value is not None]
    mode = [] if config.mode == config.auto_mode else [f"mode={config.mode}"]
    weights = [] if config.weights is None else [f"weights={quoted(config.weights)}"]
    return [*groups, *bits, *mode, *weights]


def _is_option(group: str, name: str) -> bool:
    return (config_dir() / group / f"{name}.yaml").is_file() or (
        group == "model" and split_model_name(name) is not None
    )


def defaults_for(config: Config) -> Config:
    """The config that `choices` alone produce or, if they cannot be composed, that of `qat-run` without arguments."""
    try:
        return from_hydra(compose_config(choices(config)))
    except Exception:  # any error: options may have changed since the config was written
        return from_hydra(compose_config([]))


def command(config: Config) -> str | None:
    """Return the command that produces a resolved config, or None if no command is found that gives this exact run."""
    base = defaults_for(config)
    if not config.retrains_probes:  # in the training of probes, null has another meaning than in this mode
        base, config = (replace(each, clipping=each.clipping_in_mode) for each in (base, config))
    old, new = plain(base), plain(config)
    values = flat(new)
    changed = [
        key
        for key in differences(old, new)
        if key in values and key.partition(".")[0] not in (*NOT_IN_IDENTITY, "bits")
    ]
    changed = [key for key in changed if _has_effect(key, config)]
    changed += [key for key in OF_STAGE if config.training and not _follows(key, config) and key not in changed]
    place = [] if config.data_dir == base.data_dir else [f"data_dir={quoted(config.data_dir)}"]
    for keys in ([key for key in changed if not _follows(key, config)], changed):
        said = [freed(f"{key}={quoted(values[key])}") for key in keys if key != "weights"]
        overrides = [*choices(config), *said, *place]
        if _gives(overrides, config):
            if config.mode == Mode.allocate:
                return shlex.join(["qat-bits", *(word for word in overrides if word != "mode=allocate")])
            return shlex.join(["qat-run", *overrides])
    return None


def _has_effect(key: str, config: Config) -> bool:
    """Whether a key may affect the result of a config, which has inherited it if it is a baseline."""
    first = key.partition(".")[0]
    if first in OF_QUANTIZATION and config.quantization.full_precision:
        return False
    return config.training if key in OF_STAGE else config.allocating or first != "allocation"


def _follows(key: str, config: Config) -> bool:
    """Whether a key can be omitted because it follows from the recipe's stage or belongs to an unused stage."""
    first, _, rest = key.partition(".")
    used = ("recipe.name", *(f"recipe.{mode}." for mode in {config.mode, config.auto_mode}))
    if first == "recipe":
        return key == "recipe.name" or ("." in rest and not key.startswith(used))
    for of_all in ("format", "range"):
        if key in (f"weight_{of_all}", f"activation_{of_all}"):
            return bool(getattr(config, key) == getattr(config, of_all))
    stage = config.stage
    said = (stage.epochs, stage.batch_size, scaled_lr(stage, config.batch_size))
    return key in OF_STAGE and getattr(config, key) == dict(zip(OF_STAGE, said, strict=True))[key]


def _gives(overrides: Sequence[str], config: Config) -> bool:
    """Whether `qat-run OVERRIDES` gives the same run as a config."""
    try:
        again = replace(from_hydra(compose_config(overrides)), fingerprints=config.fingerprints)
        return identity(again) == identity(config)
    except Exception:  # for example, a file or a key does not exist any more
        return False


def quoted(value: Any) -> str:
    """Return a value as text that Hydra's grammar parses back to the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{quoted(item)}' for key, item in value.items())}}}"
    if not isinstance(value, str):
        return str(value)
    if re.fullmatch(r"[A-Za-z_/.][\w/.+:-]*", value, re.ASCII) and value.lower() not in _READ_OTHERWISE:
        return value
    escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value).replace("'", "\\'")  # elsewhere a backslash is literal
    return f"'{escaped}'"


_READ_OTHERWISE = ("null", "true", "false", "nan", "inf")
