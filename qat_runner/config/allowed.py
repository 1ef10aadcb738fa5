"""What values a key may have: its names, its range, its paths. What keys must be to one another is in `resolving`."""

import functools
import os
import sys
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qat_runner.config.schema import AMP, DISTILL, MODES, OPTIMIZERS, PADDINGS, RESUME, SCHEDULES, Config
from qat_runner.config.tasks import FACTS, foreign_keys
from qat_runner.errors import ConfigError
from qat_runner.insertion.policy import GRADIENT_PAIRS, GRANULARITIES
from qat_runner.quant import EVAL_MODES, FORMATS, METHODS
from qat_runner.quant.kernels import BACKENDS


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; NaN is none of them.

    Upper ends that mean nothing by themselves are beyond any real use, and short of what overflows.
    """

    least: float
    most: float
    above: bool = False
    """without `least` itself"""
    below: bool = False
    """without `most` itself"""

    def __contains__(self, value: float) -> bool:
        over = value > self.least if self.above else value >= self.least
        return over and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        least, most = (str(n) if isinstance(n, int) else f"{n:g}" for n in (self.least, self.most))
        if not (self.above or self.below):
            return f"{least} to {most}"
        return f"{'above' if self.above else 'at least'} {least} and {'below' if self.below else 'at most'} {most}"


_EPOCHS = 100_000
_SAMPLES = 1_000_000
_BATCHES = 1_000_000_000
_TOKENS = 100_000
_LARGE = 1e30  # float32 goes to 3e38

RANGES: dict[str, Range] = {
    "epochs": Range(1, _EPOCHS),
    "batch_size": Range(1, _SAMPLES),
    "accumulate": Range(1, _SAMPLES),
    "lr": Range(0, _LARGE, above=True),
    "seed": Range(0, 2**32 - 1),
    "noise_batches": Range(0, _BATCHES),
    "limit_train_batches": Range(1, _BATCHES),
    "limit_val_batches": Range(1, _BATCHES),
    "checkpoint_minutes": Range(0, 1e6, above=True),
    "distributed_timeout": Range(0, 1e6, above=True),
    "model.width": Range(0, 4, above=True),
    "dataset.num_classes": Range(2, 100_000),
    "dataset.image_size": Range(1, 8192),
    "dataset.mean": Range(-1e6, 1e6),
    "dataset.std": Range(0, 1e6, above=True),
    "dataset.val_batch_size": Range(1, _SAMPLES),
    "dataset.workers": Range(0, 1024),
    "dataset.fake_pictures": Range(2, 100_000),
    "dataset.max_length": Range(8, _TOKENS),
    "dataset.stride": Range(1, _TOKENS),
    "dataset.train_questions": Range(1, _BATCHES),
    "dataset.val_questions": Range(1, _BATCHES),
    "dataset.n_best": Range(1, _TOKENS),
    "dataset.max_answer_length": Range(1, _TOKENS),
    "clipping.iterations": Range(1, 1000),
    "clipping.warm_iterations": Range(1, 1000),
    "clipping.points": Range(1, 10_000),
    "clipping.alpha": Range(0, _LARGE, above=True),
    "clipping.calibration_batches": Range(0, _SAMPLES),
    "clipping.calibration_batch_size": Range(1, _SAMPLES),
    "recipe.device_batch": Range(1, _SAMPLES),
    "recipe.distill_temperature": Range(0, 1e6, above=True),
    "recipe.distill_weight": Range(0, 1, above=True),
    "recipe.freeze_scalars_at": Range(0, _EPOCHS, above=True),
    "recipe.STAGE.epochs": Range(1, _EPOCHS),
    "recipe.STAGE.batch_size": Range(1, _SAMPLES),
    "recipe.STAGE.lr": Range(0, _LARGE, above=True),
    "recipe.STAGE.momentum": Range(0, 1, below=True),
    "recipe.STAGE.weight_decay": Range(0, _LARGE),
    "recipe.STAGE.max_grad_norm": Range(0, _LARGE, above=True),
    "recipe.STAGE.label_smoothing": Range(0, 1, below=True),
    "recipe.STAGE.decay_every": Range(1, _EPOCHS),
    "recipe.STAGE.decay_factor": Range(0, 1, above=True),
    "recipe.STAGE.warmup_epochs": Range(0, _EPOCHS),
}
"""The numbers that a key may hold, or each entry of its list."""

PATHS = ("data_dir", "runs_dir", "run_dir", "weights", "recipe.teacher", "model.checkpoint", "policy")
"""The keys that hold a path (some of them: or a name)."""

LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes of a file's name on Linux, and of a path (4096) with room for the files of a run."""


def check_values(config: Config) -> None:
    """Refuse a value that its key may not have, whatever the other keys are; null, where it has a meaning, passes.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    for key, names in _names().items():
        for place, value in _values(config, key):
            require(value in names, place, value, f"one of {', '.join(names)}")
    foreign = foreign_keys(config.task)
    for key, allowed in RANGES.items():
        if key in foreign and _left_alone(config, key):
            continue
        for place, value in _values(config, key):
            require(all(n in allowed for n in (value if isinstance(value, list) else [value])), place, value, allowed)
    for key in PATHS:
        for place, value in _values(config, key):
            _check_path(place, value)


def _names() -> dict[str, Collection[str]]:
    """The names that a key may hold: those of today, since methods of others can be added."""
    return {
        "mode": ("auto", *MODES),
        "amp": AMP,
        "backend": ("auto", *BACKENDS),
        "resume": RESUME,
        "gradient.name": tuple(GRADIENT_PAIRS),
        "clipping.name": METHODS,
        "format": FORMATS,
        "clipping.eval_mode": EVAL_MODES,
        "conv_granularity": GRANULARITIES,
        "linear_granularity": ("auto", *GRANULARITIES),
        "recipe.STAGE.schedule": SCHEDULES,
        "recipe.STAGE.optimizer": OPTIMIZERS,
        "recipe.distill": DISTILL,
        "dataset.padding": PADDINGS,
        "dataset.task": tuple(FACTS),
    }


def _left_alone(config: Config, key: str) -> bool:
    """Whether a key has the value that it has where nothing is said of it."""
    return functools.reduce(getattr, key.split("."), config) == functools.reduce(getattr, key.split("."), Config())


def _values(config: Config, key: str) -> list[tuple[str, Any]]:
    """A key and its value, where it is not null; one with STAGE in it stands for a key of each stage of the recipe."""
    keys = [key.replace("STAGE", stage) for stage, _ in config.recipe.stages()] if "STAGE" in key else [key]
    found = [(place, functools.reduce(getattr, place.split("."), config)) for place in keys]
    return [(place, value) for place, value in found if value is not None]


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
