"""What values a key may have: its names, its range, its paths. What keys must be to one another is in `resolving`."""

import os
import sys
import unicodedata
from collections.abc import Collection
from dataclasses import MISSING, Field
from typing import Any

from qat_runner.config.keys import leaves
from qat_runner.config.schema import LIMITS, ConfigSchema
from qat_runner.config.tasks import FACTS, foreign_keys
from qat_runner.errors import ConfigError
from qat_runner.policy import ACTIVATION_GRANULARITIES, GRANULARITIES, PRICES, gradient_names
from qat_runner.quant import EVAL_MODES, FORMATS, METHODS, Range
from qat_runner.quant.backends import BACKENDS

LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes of a file's name on Linux, and of a path (4096) with room for the files of a run."""


def check_values(config: ConfigSchema) -> None:
    """Refuse a value that its key may not have, whatever the other keys are; null, where it has a meaning, passes.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    foreign, names = foreign_keys(config.task), _names()
    for key, field, value in leaves(config):
        if value is None or (key in foreign and value == _default(field)):
            continue
        if key in names:
            require(value in names[key], key, value, f"one of {', '.join(names[key])}")
        if (allowed := field.metadata.get("range")) is not None:
            require(all(n in allowed for n in (value if isinstance(value, list) else [value])), key, value, allowed)
        if "path" in field.metadata:
            _check_path(key, value)


def _names() -> dict[str, Collection[str]]:
    """The names that a key may hold where other rooms own them: those of today, since others can be added."""
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
    """Refuse what no file can be called, before something trips over it."""
    if any(unicodedata.category(c) == "Cc" for c in path):
        raise ConfigError(f"{key}={path!r}: must be a path without line breaks and other control characters")
    try:
        path.encode(sys.getfilesystemencoding(), "strict" if key in ("run_dir", "runs_dir") else "surrogateescape")
    except UnicodeEncodeError as error:  # TensorBoard has no way to write there
        raise ConfigError(
            f"{key}={path!r}: no UTF-8, or no name in this locale; LC_ALL=C.UTF-8 has all names"
        ) from error
    name = max(map(os.fsencode, path.split("/")), key=len)
    if len(name) > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(
            f"{key}={path[:40]}...: must be a path of at most {LONGEST_PATH} bytes, {LONGEST_NAME} between two slashes"
        )


def require(holds: bool, key: str, value: object, allowed: object) -> None:
    """Raises:
    ConfigError: if it does not hold, naming key, value and what is allowed.
    """
    if not holds:
        raise ConfigError(f"{key}={value}: must be {allowed}")
