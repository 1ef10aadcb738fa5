"""When two configs are the same run: the keys that determine a result, the run names derived from them, and saved
configs."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from qat_runner.config.fingerprints import path_of
from qat_runner.config.keys import leaves, plain
from qat_runner.config.model_names import checkpoint_of, label
from qat_runner.config.plain_yaml import plain_yaml
from qat_runner.config.resolving import baseline_of
from qat_runner.config.schema import (
    AUTO,
    BASELINE,
    LIMITS,
    MIXED,
    OF_STAGE,
    ClippingConfig,
    Config,
    Distill,
    Mode,
    OscillationsConfig,
)
from qat_runner.config.tasks import foreign_keys
from qat_runner.config.versions import FIRST_DEFAULTS, FIRST_DEFAULTS_OF_STAGE, REVISED, SCHEMA_VERSION, migrate
from qat_runner.errors import UnreadableError
from qat_runner.quant import Range

CONFIG_FILE = "config.yaml"
"""Name of the file in a run folder that holds the config."""

NOT_IN_IDENTITY = (
    *("data_dir", "runs_dir", "run_dir", "overwrite", "resume", "sweep", "standins", "fingerprints"),
    *(
        "checkpoint_minutes",
        "distributed_timeout",
        "schema_version",
        "trackers",
        "policy",
        "given",
        "allocated",
    ),  # the rules of `policy` are in `rules`
)
"""Keys that affect where files are and what is stored, but not what is computed."""

OF_QUANTIZATION = (
    *("clipping", "gradient", "first_last_bits", "quantize_head", "rules"),
    *("noise_batches", "backend", "log_excess_mse"),
    *("conv_granularity", "linear_granularity", "activation_granularity"),
    *("format", "weight_format", "activation_format", "weight_range", "activation_range"),
)
"""Keys that have no effect in full precision."""


def identity(config: Config) -> dict[str, Any]:
    """Return the dotted keys that identify the run of a resolved config: if they are equal, it is the same run.

    These are its `settings`, without those that have their first default (see `versions`).
    """
    usual = FIRST_DEFAULTS | {f"recipe.{key}": value for key, value in FIRST_DEFAULTS_OF_STAGE.items()}
    return {key: value for key, value in settings(config).items() if key not in usual or value != usual[key]}


def settings(config: Config) -> dict[str, Any]:
    """Return the dotted keys of a resolved config that determine its result.

    Weights are compared by content, not by path. Clipping and gradient are left out for a full-precision run, and the
    recipe for a run that does not train.
    """
    keys = {key: value for key, value in plain(config).items() if key not in NOT_IN_IDENTITY}
    for normalize in (
        _normalize_tensors,
        _normalize_files,
        _normalize_training,
        _normalize_allocation,
        _normalize_remedies,
        _normalize_clipping,
    ):
        normalize(keys, config)
    foreign = foreign_keys(config.task)
    return {key: value for key, value in flat(keys).items() if key not in foreign}


def _normalize_tensors(keys: dict[str, Any], config: Config) -> None:
    """Remove keys that only set other keys."""
    if config.weight_format == config.activation_format:  # as in configs from before the two could differ
        keys["format"] = keys.pop("weight_format")
        del keys["activation_format"]
    else:
        del keys["format"]
    del keys["bits"], keys["range"]
    del keys["dataset"]["workers"], keys["dataset"]["task"]  # the task follows from the name
    del keys["dataset"]["preprocessing"]  # its result is in the other keys


def _normalize_files(keys: dict[str, Any], config: Config) -> None:
    """Replace files by their content, and data folders without a name of their own (images, text) by their path."""
    if config.model.checkpoint is not None and "model.checkpoint" not in foreign_keys(config.task):
        keys["model"]["checkpoint"] = config.content(config.model.checkpoint)
    if (checkpoint := checkpoint_of(config.model.name)) is not None:
        keys["model"]["name"] = f"hf/{config.content(checkpoint)}"
    if config.weights is not None:
        baseline = config.weights == BASELINE
        keys["weights"] = run_name(baseline_of(config)) if baseline else config.content(config.weights)
    if config.dataset.name in ("imagefolder", "text"):
        keys["data_dir"] = str(path_of(config.data_dir).resolve())
    if config.allocating and config.allocation.latencies is not None:
        keys["allocation"]["latencies"] = config.content(config.allocation.latencies)


def _normalize_training(keys: dict[str, Any], config: Config) -> None:
    """Keep of the recipe only the stage that is trained and the teacher, if there is one. The teacher of networks that
    are retrained during bit allocation counts as well."""
    keys["recipe"] = plain(config.stage) if config.training else None
    if not config.training:
        for key in (*OF_STAGE, *(() if config.retrains_probes else ("accumulate",))):
            del keys[key]
    recipe = config.recipe
    if config.distilling or (config.retrains_probes and recipe.distill != Distill.none):
        keys["distill"] = {
            "teacher": None if recipe.teacher is None else config.content(recipe.teacher),
            "temperature": recipe.distill_temperature,
            "weight": recipe.distill_weight,
        }
        if recipe.teacher_part is not None:
            keys["distill"]["teacher_part"] = recipe.teacher_part
        if recipe.teacher_model is not None:
            keys["distill"]["teacher_model"] = recipe.teacher_model


def _normalize_allocation(keys: dict[str, Any], config: Config) -> None:
    """Keep the keys of bit allocation only if bit-widths are chosen."""
    if not config.allocating:
        for key in (*LIMITS, "max_drop", "retrain_steps", "allocation"):
            del keys[key]
    elif config.policy == AUTO:
        keys["policy"] = AUTO
        if config.retrains_probes and config.mode != Mode.retrain:
            keys["retrain"] = plain(config.recipe)["retrain"]
    elif config.retrains_probes:
        keys["recipe"] = plain(config.recipe)["retrain"]


def _normalize_remedies(keys: dict[str, Any], config: Config) -> None:
    """Keep the keys of remedies only if these are applied in training."""
    recipe = config.recipe
    if config.freezing or (config.retrain_steps and recipe.freeze_scalars_at is not None):
        keys["freeze_scalars_at"] = recipe.freeze_scalars_at
    if config.reestimating or (config.retrain_steps and recipe.batchnorm_batches):
        keys["batchnorm_batches"] = recipe.batchnorm_batches
    if not (config.quantized_training or config.retrain_steps):
        del keys["oscillations"]
    else:
        for key in _without_effect(config.oscillations):
            del keys["oscillations"][key]


def _without_effect(how: OscillationsConfig) -> tuple[str, ...]:
    """The keys about oscillations that have no effect given the others."""
    if how.freeze_to is not None:
        return ()
    return ("freeze_from",) if how.watching else ("freeze_from", "momentum", "threshold", "max_bits")


def _normalize_clipping(keys: dict[str, Any], config: Config) -> None:
    """Keep the keys of clipping and gradients that have an effect; in full precision none has."""
    if config.quantization.full_precision:
        for key in OF_QUANTIZATION:
            keys.pop(key, None)
        return
    keys["clipping"] = plain(config.clipping_in_mode)
    if config.retrains_probes and config.mode in (Mode.ptq, Mode.allocate):  # null means something else in retraining
        asked = {key: getattr(config.clipping, key) for key in ("missing_code", "refine")}
        keys |= {f"retrained.{key}": value for key, value in asked.items() if value is not None}
    if not (config.needs_calibration or config.calibrates_probes):
        del keys["clipping"]["calibration_batches"], keys["clipping"]["calibration_batch_size"]
    if config.schema_version >= (revision := REVISED.get(config.clipping.name, SCHEMA_VERSION + 1)):
        keys["clipping"]["revision"] = revision
    if config.all_learned:
        del keys["gradient"]
    elif config.all_static:  # every eval_mode has the same effect
        keys["clipping"]["eval_mode"] = ClippingConfig.eval_mode


def load_config(folder: Path) -> Config | None:
    """Return the config of the run in a folder, or None if the folder holds no run.

    Raises:
        UnreadableError: the config cannot be read.
    """
    path = folder / CONFIG_FILE
    return read_config(path) if path.is_file() else None


def read_config(path: Path) -> Config:
    """Read a config that a run saved with this version of the schema or an earlier one.

    Raises:
        UnreadableError: the file is not YAML, not a config of a run, or from a later version.
    """
    from qat_runner.description import fit  # pydantic takes a fifth of a second to import

    try:
        saved: Config = fit(Config, migrate(plain_yaml(path)), strict=False)
        for name, _, value in leaves(saved):
            if value == MISSING:
                raise ValueError(f"{name} is missing")
        identity(saved)
    except Exception as error:  # the file may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"{path}: cannot be read ({reason})") from error
    return saved


def run_folder(config: Config) -> Path:
    """Return the folder of a config's run: `run_dir`, or a folder in `runs_dir` that is named after the config.

    If a folder holds this run under the name that an earlier version gave it, that folder is returned.
    """
    if config.run_dir is not None:
        return _direct(path_of(config.run_dir))
    runs, name = _direct(path_of(config.runs_dir)), run_name(config)
    if not (runs / name).exists():
        for folder in sorted(runs.glob(f"{name.rpartition('_')[0]}_*/")):
            with suppress(UnreadableError):
                if (saved := load_config(folder)) is not None and identity(saved) == identity(config):
                    return folder
    return runs / name


def _direct(path: Path) -> Path:
    """Return a path without `..` after a folder, which need not exist; a link before `..` is followed."""
    plain = Path(os.path.normpath(path))
    return plain if ".." not in path.parts or plain.resolve() == path.resolve() else path.resolve()


def run_name(config: Config) -> str:
    """Return a folder name with the main choices and a fingerprint of everything in `identity`."""
    fingerprint = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    return "_".join(
        [
            label(config.model.name),
            config.dataset.name,
            config.mode,
            *_quantization_words(config),
            f"seed{config.seed}",
            fingerprint,
        ]
    )


def _quantization_words(config: Config) -> list[str]:
    if config.quantization.full_precision:
        return ["fp32"]
    same = config.weight_bits == config.activation_bits
    bits = f"{config.weight_bits}bit" if same else f"w{config.weight_bits}a{config.activation_bits}"
    if config.allocating:
        bits = config.asked_bits.replace("=", "").replace(", ", "-").replace("_", "-")
    beside = [*(["distilled"] if config.distilling else []), *config.remedies]
    bits += f"-{MIXED}" if config.rules else ""
    return [bits, clipping_label(config), *([] if config.clipping.learned else [config.gradient.name]), *beside]


def clipping_label(config: Config, became_static: bool | None = None) -> str:
    """Return a label for the clipping method: octav, octav-to-static, static-percentile99.9, ...; "none" for full
    precision.

    Args:
        config: a resolved config.
        became_static: whether the scalars of activations have become static; None: whether the config makes them static
            in training.
    """
    if config.quantization.full_precision:
        return "none"
    suffix = "" if config.clipping.q is None else f"{config.clipping.q:g}"
    suffix += "-from-octav" if config.clipping.start == "octav" else ""
    static = not config.clipping.dynamic and not config.clipping.learned
    became_static = config.freezing if became_static is None else became_static
    became = config.clipping.dynamic and not config.clipping.learned and became_static
    parts = ["static"] if static else []
    of_both = (
        *_of_both(config.weight_format.replace("_", "-"), config.activation_format.replace("_", "-"), "int"),
        *_of_both(config.weight_range, config.activation_range, Range.TWOS_COMPLEMENT),
    )
    of_both += ("per-token",) if config.activation_granularity == "token" else ()
    return "-".join([*parts, config.clipping.name + suffix, *of_both, *(["to-static"] if became else [])])


OPTIONS_OF_LABEL = ("q", "start")
"""Options of a clipping method that its label shows."""


def _of_both(weights: str, activations: str, usual: str) -> list[str]:
    """Return the parts of a label for the values of weights and activations that differ from the usual one."""
    if weights == activations:
        return [] if weights == usual else [weights]
    both = {"weights": weights, "activations": activations}
    return [f"{what}-{its}" for what, its in both.items() if its != usual]


def policy_label(config: Config, *, hashed: bool = True) -> str:
    """Return a label for what gives single tensors their own settings, or an empty string.

    "policy auto" is for bit-widths that are chosen, "policy 1a2b3c" for rules: the first digits of a hash of the rules,
    whether they come from a file or from the command. Without `hashed`, it is "policy auto" or "policy".
    """
    if config.quantization.full_precision:
        return ""
    if not hashed:
        return "policy auto" if config.allocating else "policy" if config.rules else ""
    rules = hashlib.sha256(json.dumps(config.rules, sort_keys=True).encode()).hexdigest()[:6] if config.rules else ""
    if config.allocating:
        return f"policy auto with rules {rules}" if rules else "policy auto"
    return f"policy {rules}" if rules else ""


def gradient_label(config: Config) -> str:
    """Return a label for the gradient estimator, with options that differ from the defaults; "own" for learned methods,
    which have their own."""
    if config.quantization.full_precision:
        return "none"
    return "own" if config.all_learned else str(config.gradient.estimator)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert a nested config to a mapping from dotted keys to values."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested configs differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found


_ABSENT = object()
