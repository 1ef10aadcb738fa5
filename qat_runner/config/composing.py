"""Composing the shipped configs, and the way back: from a config to the command that asks for it."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qat_runner.config.identities import PLACES, differences, flat, identity
from qat_runner.config.resolving import from_hydra, scaled_lr
from qat_runner.config.schema import Config, register

HYDRA_VERSION_BASE = "1.3"

_OF_STAGE = ("epochs", "batch_size", "lr")
"""Keys that follow from the recipe unless they are given."""


def config_dir() -> Path:
    """The folder of Hydra configs: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """What `qat-run OVERRIDES` composes, as yet unresolved.

    Raises:
        HydraException, OmegaConfBaseException, ValueError: it cannot be composed.
    """
    register()
    with initialize_config_dir(str(config_dir()), version_base=HYDRA_VERSION_BASE):
        return compose("config", overrides=list(overrides))


def choices(config: Config) -> list[str]:
    """What a resolved config was chosen by: the groups that are shipped under its names, bits, mode and weights."""
    static = not config.clipping.dynamic and not config.clipping.learned
    wanted = {"model": config.model.name, "dataset": config.dataset.name}
    if config.recipe.name != config.dataset.name:
        wanted["recipe"] = config.recipe.name
    if not config.policy.full_precision:
        wanted["clipping"] = ("static_" if static else "") + config.clipping.name
        wanted["gradient"] = config.gradient.name
    groups = [f"{group}={name}" for group, name in wanted.items() if (config_dir() / group / f"{name}.yaml").is_file()]
    bits = config.weight_bits if config.weight_bits == config.activation_bits else config.bits
    mode = [] if config.mode == config.auto_mode else [f"mode={config.mode}"]
    weights = [] if config.weights is None else [f"weights={_value(config.weights)}"]
    return [*groups, f"bits={bits}", *mode, *weights]


def defaults_for(config: Config) -> Config:
    """The config that `choices` alone give, or where they give none, that of `qat-run` without arguments."""
    try:
        return from_hydra(compose_config(choices(config)))
    except Exception:  # whatever: options may have changed since
        return from_hydra(compose_config([]))


def command(config: Config) -> str | None:
    """The command that asks for a resolved config again; None if none is found that gives this very run."""
    base = defaults_for(config)
    old, new = asdict(base), asdict(config)
    values = flat(new)
    changed = [key for key in differences(old, new) if key in values and key.partition(".")[0] not in (*PLACES, "bits")]
    changed += [key for key in _OF_STAGE if not _follows(key, config) and key not in changed]
    place = [] if config.data_dir == base.data_dir else [f"data_dir={_value(config.data_dir)}"]
    for keys in ([key for key in changed if not _follows(key, config)], changed):
        overrides = [*choices(config), *(f"{key}={_value(values[key])}" for key in keys if key != "weights"), *place]
        if _gives(overrides, config):
            return shlex.join(["qat-run", *overrides])
    return None


def _follows(key: str, config: Config) -> bool:
    """Whether a key may be left to others: to the recipe's stage, or as one of a stage that is not used."""
    first, _, rest = key.partition(".")
    used = ("recipe.name", *(f"recipe.{mode}." for mode in {config.mode, config.auto_mode}))
    if first == "recipe":
        return key == "recipe.name" or ("." in rest and not key.startswith(used))
    stage = config.stage
    assert config.batch_size is not None
    said = (stage.epochs, stage.batch_size, scaled_lr(stage, config.batch_size))
    return key in _OF_STAGE and getattr(config, key) == dict(zip(_OF_STAGE, said, strict=True))[key]


def _gives(overrides: Sequence[str], config: Config) -> bool:
    """Whether `qat-run OVERRIDES` is the run of a config."""
    try:
        again = replace(from_hydra(compose_config(overrides)), fingerprints=config.fingerprints)
        return identity(again) == identity(config)
    except Exception:  # a file that is gone, a key that is no more
        return False


def _value(value: Any) -> str:
    """As Hydra's grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    text = str(value)
    plain = not isinstance(value, str) or all(c.isalnum() or c in "/._-+:" for c in text)
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if plain else f"'{quoted}'"
