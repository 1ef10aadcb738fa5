"""Checks of single keys: allowed names, ranges and paths. Checks across several keys are in `resolving`."""

import os
import sys
import unicodedata
from collections.abc import Collection
from dataclasses import MISSING, Field
from typing import Any

from qat_runner.config.keys import leaves, names_of
from qat_runner.config.schema import LIMITS, ConfigSchema
from qat_runner.config.tasks import FACTS, foreign_keys
from qat_runner.errors import ConfigError
from qat_runner.policy import ACTIVATION_GRANULARITIES, GRANULARITIES, PRICES, gradient_names
from qat_runner.quant import EVAL_MODES, FORMATS, METHODS, Range
from qat_runner.quant.backends import BACKENDS
from qat_runner.wording import closest, meant, one_of

LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Maximum bytes of a file name on Linux, and of a path: 4096, less some room for the files of a run."""


NOT_TYPED = {
    **dict.fromkeys(("sweep", "standins"), "can only be set in the files of experiments and stand-ins"),
    **dict.fromkeys(("given", "allocated", "fingerprints"), "cannot be set; the runner fills it in"),
}
"""Keys that a command cannot set, and the reason."""


def check_values(config: ConfigSchema) -> None:
    """Check each value on its own, independently of the other keys. Null passes where the type allows it.

    Raises:
        ConfigError: a value is not allowed; the message gives the key, the value and what is allowed.
    """
    foreign, names = foreign_keys(config.task), _names()
    for key, field, value in leaves(config):
        if value is None or (key in foreign and value == _default(field)):
            continue
        if key in names and value not in names[key]:
            raise ConfigError(f"{key}={value}: {one_of(value, names[key])}")
        if (allowed := field.metadata.get("range")) is not None:
            require(all(n in allowed for n in (value if isinstance(value, list) else [value])), key, value, allowed)
        if "path" in field.metadata:
            _check_path(key, value)


def _names() -> dict[str, Collection[str]]:
    """The allowed names of keys whose values are defined in other packages. Plugins can add names at any time."""
    return {
        "backend": ("auto", *BACKENDS),
        "model.stride_in": ("3x3", "1x1"),
        "gradient.name": gradient_names(),
        "clipping.name": METHODS,
        **dict.fromkeys(("format", "weight_format", "activation_format"), FORMATS),
        **dict.fromkeys(("range", "weight_range", "activation_range"), tuple(Range)),
        "clipping.eval_mode": EVAL_MODES,
        "conv_granularity": GRANULARITIES,
        "linear_granularity": ("auto", *GRANULARITIES),
        "activation_granularity": ACTIVATION_GRANULARITIES,
        "dataset.task": tuple(FACTS),
        "allocation.price": PRICES,
        "allocation.cost": ("mean_bits", *LIMITS[1:]),
    }


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_path(key: str, path: str) -> None:
    """Reject a path that no file can have, before it causes an error elsewhere."""
    if any(unicodedata.category(c) == "Cc" for c in path):
        raise ConfigError(f"{key}={path!r}: must be a path without line breaks or other control characters")
    try:
        path.encode(sys.getfilesystemencoding(), "strict" if key in ("run_dir", "runs_dir") else "surrogateescape")
    except UnicodeEncodeError as error:  # TensorBoard cannot write to such a path
        raise ConfigError(
            f"{key}={path!r}: must be valid UTF-8 that this locale can encode; LC_ALL=C.UTF-8 can encode all names"
        ) from error
    name = max(map(os.fsencode, path.split("/")), key=len)
    if len(name) > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(
            f"{key}={path[:40]}...: must be a path of at most {LONGEST_PATH} bytes, with at most {LONGEST_NAME} bytes "
            f"between two slashes"
        )


def unknown_key(key: str) -> str:
    """Return the error message about a key that the schema does not have, with the key that was probably meant."""
    return f"unknown key '{key}'{_meant_key(key) or '; qat-run --help lists all keys'}"


def _meant_key(key: str) -> str:
    """Return a suggestion: the keys of the same last name, a similar one in the same group, an option of the method or
    estimator, or a similar key."""
    known = [name for name in names_of(ConfigSchema) if name.partition(".")[0] not in NOT_TYPED]
    group, _, name = key.rpartition(".")
    alike = [each for each in known if each.rpartition(".")[2] == name and name not in ("name", "options")]
    if name in alike:
        return f"; did you mean {name}?"
    if alike:
        one_per_group = {each.partition(".")[0]: each for each in reversed(alike)}
        return f"; did you mean {' or '.join(sorted(one_per_group.values(), key=known.index))}?"
    inside = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == group}
    if not group or not inside:
        return meant(key, known)
    if close := closest(name, inside):  # compared without the group, in which all of them are alike
        return f"; did you mean {inside[close]}?"
    return f"; did you mean {group}.options.{name}?" if "options" in inside else ""


def require(holds: bool, key: str, value: object, allowed: object) -> None:
    """Check a condition on the value of a key.

    Raises:
        ConfigError: the condition is false; the message gives the key, the value and what is allowed.
    """
    if not holds:
        raise ConfigError(f"{key}={value}: must be {allowed}")
