"""Versions of the schema: how older configs are converted, and which values do not affect the identity of a run.

A run is identified by the keys whose values differ from `FIRST_DEFAULTS`, the default that each key had when it was
introduced. This table only ever grows. So a new key does not change the identity of earlier runs, and changing a
default later renames no run that has the old value.

If you add a key, add its line to the table. If you rename or remove a key, or change the meaning of a value, increment
`SCHEMA_VERSION` and add a step to `_STEPS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

SCHEMA_VERSION = 2
"""The version of configs that are written now; configs without a version are version 1."""

FIRST_DEFAULTS: dict[str, Any] = {
    "model.stem": "auto",
    "model.width": 1.0,
    "model.stride_in": "3x3",
    "model.bn_eps": None,
    "model.checkpoint": None,
    "dataset.task": "classification",
    "dataset.num_classes": None,
    "dataset.image_size": 0,
    "dataset.mean": [],
    "dataset.std": [],
    "dataset.augment": "none",
    "dataset.val_batch_size": 500,
    "dataset.workers": 4,
    "dataset.skip_corrupt": False,
    "dataset.resizing": "pillow",
    "dataset.decode": "cpu",
    "dataset.interpolation": "bilinear",
    "dataset.resize_size": None,
    "dataset.preprocessing": "auto",
    "dataset.fake_pictures": 512,
    "dataset.max_length": 384,
    "dataset.stride": 128,
    "dataset.padding": "max_length",
    "dataset.one_window": False,
    "dataset.train_questions": None,
    "dataset.val_questions": None,
    "dataset.n_best": 20,
    "dataset.max_answer_length": 30,
    "clipping.dynamic": True,
    "clipping.iterations": None,
    "clipping.warm_iterations": None,
    "clipping.q": None,
    "clipping.points": None,
    "clipping.together": None,
    "clipping.alpha": None,
    "clipping.start": None,
    "clipping.missing_code": None,
    "clipping.refine": None,
    "clipping.calibration_batches": None,
    "clipping.calibration_batch_size": None,
    "clipping.sync": False,
    "clipping.eval_mode": "dynamic",
    "clipping.options": {},
    "gradient.options": {},
    "recipe.device_batch": None,
    "recipe.scratch": None,
    "recipe.retrain": None,
    "recipe.long_retrain": None,
    "recipe.finetune": None,
    "recipe.distill": "none",
    "recipe.teacher": None,
    "recipe.teacher_model": None,
    "recipe.teacher_part": None,
    "recipe.distill_temperature": 4.0,
    "recipe.distill_weight": 0.5,
    "recipe.freeze_scalars_at": None,
    "recipe.batchnorm_batches": 0,
    "allocation.price": "gradient",
    "allocation.widths": [2, 3, 4, 5, 6, 7, 8],
    "allocation.same": False,
    "allocation.batches": 16,
    "allocation.batch_size": 32,
    "allocation.cost": "mean_bits",
    "allocation.latencies": None,
    "oscillations.measure": False,
    "oscillations.momentum": 0.01,
    "oscillations.threshold": 0.005,
    "oscillations.max_bits": 4,
    "oscillations.freeze_to": None,
    "oscillations.freeze_from": 0.1,
    "oscillations.dampening": 0.0,
    "budget": None,
    "size_mb": None,
    "bitops": None,
    "traffic_mb": None,
    "latency_ms": None,
    "max_drop": None,
    "retrain_steps": 0,
    "allocated": [],
    "weights": None,
    "weights_part": None,
    "weight_bits": None,
    "activation_bits": None,
    "first_last_bits": None,
    "quantize_head": None,
    "conv_granularity": "channel",
    "linear_granularity": "auto",
    "activation_granularity": "tensor",
    "format": "int",
    "weight_format": "int",
    "activation_format": "int",
    "range": "twos_complement",
    "weight_range": "twos_complement",
    "activation_range": "twos_complement",
    "rules": [],
    "policy": None,
    "epochs": None,
    "batch_size": None,
    "lr": None,
    "accumulate": 1,
    "seed": 0,
    "backend": "auto",
    "device": "auto",
    "amp": "none",
    "channels_last": True,
    "cudnn_benchmark": False,
    "compile": False,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "noise_batches": 1,
    "sync_batchnorm": False,
    "distributed_timeout": 600.0,
    "checkpoint_minutes": 10.0,
    "sweep": {},
    "standins": {},
    "fingerprints": {},
    "given": [],
    "trackers": ["tensorboard"],
    "log_excess_mse": False,
    "run_dir": None,
    "overwrite": False,
    "resume": "auto",
}
"""Dotted key -> its first default. Keys that never had a default are not listed."""

FIRST_DEFAULTS_OF_STAGE: dict[str, Any] = {
    "optimizer": "sgd",
    "bias_correction": True,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "spared": "vectors",
    "nesterov": False,
    "max_grad_norm": None,
    "label_smoothing": 0.0,
    "schedule": "step",
    "decay_every": 30,
    "decay_factor": 0.1,
    "warmup_epochs": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "random_erasing": 0.0,
    "ema_decay": 0.0,
    "drop_path": None,
}
"""The first defaults of the keys of each stage of a recipe."""

REVISED = {"pact": 2}
"""Clipping method -> the schema version since which it computes something else: earlier runs are different runs."""


def migrate(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a resolved config of any version to the current schema; `schema_version` keeps the version in which it
    was written.

    Raises:
        ValueError: the version is later than the current one, or not a number.
    """
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in saved.items()}
    version = config.setdefault("schema_version", 1)
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"schema_version={version}: must be 1 to {SCHEMA_VERSION}; a later qat_runner wrote this file")
    for step in _STEPS[version - 1 :]:
        step(config)
    if config.get("dataset", {}).get("name") == "squad":  # from before data sets had a task
        config["dataset"].setdefault("task", "question_answering")
    for key in ("weight_format", "activation_format"):
        config.setdefault(key, config.get("format", "int"))
    for key, value in FIRST_DEFAULTS.items():  # keys that were introduced after it was written
        group, _, name = key.rpartition(".")
        (config.setdefault(group, {}) if group else config).setdefault(name, value)
    recipe = config["recipe"]
    for stage, values in recipe.items():
        if isinstance(values, Mapping):
            recipe[stage] = FIRST_DEFAULTS_OF_STAGE | dict(values)
    return config


def _to_2(config: dict[str, Any]) -> None:
    """Version 1 -> 2: calibration used the batch size of training; eval_mode "last" was called "frozen"."""
    clipping = config.setdefault("clipping", {})
    clipping.setdefault("calibration_batch_size", config.get("batch_size"))
    if clipping.get("eval_mode") == "frozen":
        clipping["eval_mode"] = "last"


_STEPS: tuple[Callable[[dict[str, Any]], None], ...] = (_to_2,)
"""The conversions from version 1 to 2, and so on; each changes a config in place."""
