"""Resolving a config composed by Hydra to a complete and consistent one, or explaining why that is impossible.

A composed config may leave out keys that follow from others (bit-width of weights, epochs, ...). `resolve` fills them
in, and `check` rejects contradictions, before any work. A run's `config.yaml` is the resolved config.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from qat_runner.config.allowed import check_values, require, unknown_key
from qat_runner.config.fingerprints import path_of
from qat_runner.config.plain_yaml import plain_yaml
from qat_runner.config.schema import (
    AUTO,
    BASELINE,
    LIMITS,
    OF_STAGE,
    PRETRAINED,
    TORCHVISION,
    ClippingConfig,
    Config,
    ConfigSchema,
    Decode,
    Distill,
    Interpolation,
    Mode,
    Optimizer,
    OscillationsConfig,
    Preprocessing,
    Resizing,
    StageConfig,
)
from qat_runner.config.tasks import TaskFacts, foreign_keys
from qat_runner.config.versions import SCHEMA_VERSION
from qat_runner.errors import ConfigError, one_line
from qat_runner.plugins import later
from qat_runner.policy import FULL_PRECISION, Rule
from qat_runner.quant import BITS, METHODS, Range


def from_hydra(composed: DictConfig) -> Config:
    """Resolve and check a composed config.

    Raises:
        ConfigError: keys contradict each other, or a value is out of range.
    """
    try:
        config = OmegaConf.to_object(composed)
    except Exception as error:  # OmegaConf: a missing value, an interpolation of a key that does not exist
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(config, ConfigSchema)
    for key in _unknown_keys(config):
        raise ConfigError(unknown_key(key))
    for key in ("allocated", "fingerprints"):
        if getattr(config, key):
            raise ConfigError(f"{key}: cannot be set; the runner fills it in")
    require(config.schema_version == SCHEMA_VERSION, "schema_version", config.schema_version, f"{SCHEMA_VERSION}")
    resolved = resolve(config)
    _check_asked(config, resolved)
    return resolved


def _check_asked(config: ConfigSchema, resolved: Config) -> None:
    """Reject keys without effect in a request. They are allowed in a config that is derived from another one or that an
    earlier version accepted, and keys about quantization are allowed in full precision.
    """
    if resolved.quantization.full_precision:
        return
    for rule in map(Rule.from_dict, resolved.rules):
        if rule.without_effect:
            raise ConfigError(f"rules: rule {rule.match!r}: sets nothing; it needs a setting, such as bits")
    clipping = resolved.clipping
    if clipping.sync and resolved.mode in (Mode.ptq, Mode.evaluate):
        raise ConfigError(f"clipping.sync=true: applies only to training, and mode={resolved.mode} does not train")
    if clipping.dynamic and clipping.learned and clipping.name in METHODS.own:
        raise ConfigError(f"clipping.dynamic=true: must be false: clipping={clipping.name} learns its scalars")
    for key, usual in _CHOSEN.items() if config.allocating else ():
        if (bits := getattr(config, key)) not in (usual, FULL_PRECISION):
            what = "bits=auto" if config.policy == AUTO else "mode=allocate"
            raise ConfigError(
                f"{key}={bits}: cannot be set with {what}, which chooses bit-widths; "
                f"rules=[{{match: GLOB, bits: {bits}}}] sets those of single tensors"
            )


def check_keys_of_training(rows: Sequence[tuple[DictConfig, Config]]) -> None:
    """Reject epochs, batch_size and lr in a command of which no run trains a network with them. In a sweep over modes,
    they may be meant for the other rows.

    Args:
        rows: for each row of the command, the composed and the resolved config.

    Raises:
        ConfigError: names the key and the mode, and the keys that set the same where something else is trained.
    """
    for key in OF_STAGE:
        asked = [(composed[key], config) for composed, config in rows if composed[key] is not None]
        if not asked or any(config.training for _, config in asked):
            continue
        value, config = asked[0]
        if config.mode == Mode.allocate or config.retrains_probes:
            raise ConfigError(
                f"{key}={value}: cannot be set with mode={config.mode}; retrain_steps sets how long networks are "
                f"retrained, recipe.retrain.lr and recipe.retrain.batch_size set how"
            )
        of_baseline = f"; recipe.{config.auto_mode}.{key}={value} sets it for the full-precision baseline"
        raise ConfigError(
            f"{key}={value}: applies only to training, and mode={config.mode} does not train"
            f"{of_baseline if config.weights == BASELINE else ''}"
        )


_CHOSEN = {"bits": ConfigSchema.bits, "weight_bits": None, "activation_bits": None}
"""Keys that set the bit-width of all tensors, and their values if they are not given."""


def _unknown_keys(config: Any, prefix: str = "") -> list[str]:
    """Return keys that were added with +key=value and that the schema does not have."""
    known = {f.name for f in fields(config)}
    unknown = [prefix + key for key in vars(config) if key not in known]
    for key in known:
        if is_dataclass(getattr(config, key)):
            unknown += _unknown_keys(getattr(config, key), f"{prefix}{key}.")
    return unknown


def resolve(config: ConfigSchema) -> Config:
    """Fill in the keys that follow from others, and check the result."""
    check_values(config)
    config = _preprocessed(_with_home(config))
    task = config.task
    config = replace(config, mode=config.auto_mode if config.mode == Mode.auto else config.mode)
    stage = config.stage
    batch_size = stage.batch_size if config.batch_size is None else config.batch_size
    rules = [] if config.policy in (None, AUTO) else rules_of(config.policy)
    resolved = Config(
        **_values(config)
        | {
            "clipping": _resolved_clipping(config, task),
            "policy": AUTO if config.policy == AUTO else None,
            "rules": [*rules, *config.rules],
            "first_last_bits": task.first_last_bits if config.first_last_bits is None else config.first_last_bits,
            "linear_granularity": task.linear_granularity
            if config.linear_granularity == "auto"
            else config.linear_granularity,
            "weight_bits": config.bits if config.weight_bits is None else config.weight_bits,
            "activation_bits": config.bits if config.activation_bits is None else config.activation_bits,
            "weight_format": config.format if config.weight_format is None else config.weight_format,
            "activation_format": config.format if config.activation_format is None else config.activation_format,
            "weight_range": config.range if config.weight_range is None else config.weight_range,
            "activation_range": config.range if config.activation_range is None else config.activation_range,
            "epochs": stage.epochs if config.epochs is None else config.epochs,
            "batch_size": batch_size,
            "lr": scaled_lr(stage, batch_size) if config.lr is None else config.lr,
        }
    )
    if resolved.policy == AUTO and resolved.quantization.full_precision:  # a full-precision row of a sweep
        resolved = replace(resolved, policy=None, **without_choice())
    check(resolved)
    return resolved


def _preprocessed(config: ConfigSchema) -> ConfigSchema:
    """Set the preprocessing of images to that of the model's library, if requested; keys that the command sets stay."""
    if not config.preprocessed:
        return config
    described = _DESCRIBED.load()(config.model.name)
    described["interpolation"] = Interpolation(described["interpolation"])
    if "dataset.image_size" in config.given:
        size = config.dataset.image_size
        described["resize_size"] = round(size * described["resize_size"] / described["image_size"])
    taken = {key: value for key, value in described.items() if f"dataset.{key}" not in config.given}
    taken["preprocessing"] = Preprocessing.model
    return replace(config, dataset=replace(config.dataset, **taken))


_DESCRIBED = later("qat_runner.models.libraries:preprocessing_keys")
"""Imported on demand: it is in a higher layer, slow to import, and only needed if the preprocessing is the model's."""


def _resolved_clipping(config: ConfigSchema, task: TaskFacts) -> ClippingConfig:
    clipping = config.clipping
    usual = {
        "calibration_batches": task.calibration_batches,
        "calibration_batch_size": task.calibration_batch_size,
    }
    return ClippingConfig(**_values(clipping) | {key: n for key, n in usual.items() if getattr(clipping, key) is None})


def _values(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass and their values."""
    return {each.name: getattr(config, each.name) for each in fields(config)}


def _with_home(config: ConfigSchema) -> ConfigSchema:
    """Expand `~` in paths, since a shell may not expand it in `key=~/x`."""
    run_dir, checkpoint = (
        None if path is None else os.path.expanduser(path) for path in (config.run_dir, config.model.checkpoint)
    )
    return replace(
        config,
        data_dir=os.path.expanduser(config.data_dir),
        runs_dir=os.path.expanduser(config.runs_dir),
        run_dir=run_dir,
        model=replace(config.model, checkpoint=checkpoint),
    )


def latencies_of(path: str) -> dict[str, dict[tuple[int, ...], float]]:
    """Read measured latencies: layer -> bit-widths of its operands -> milliseconds.

    Raises:
        ConfigError: the file does not exist or has other content.
    """
    try:
        content = json.loads(path_of(path).read_text(encoding="utf-8"))
        return {
            layer: {tuple(map(int, widths.split("x"))): _milliseconds(ms) for widths, ms in row.items()}
            for layer, row in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"allocation.latencies={path}: must be a JSON file of layer -> bit-widths (such as 4x8) -> milliseconds "
            f"({one_line(error)})"
        ) from error


def _milliseconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a number of milliseconds")
    return float(value)


def rules_of(path: str) -> list[Any]:
    """Read the rules of a policy file without checking them.

    Raises:
        ConfigError: the file does not exist or does not hold rules.
    """
    file = path_of(path)
    if not file.is_file():
        raise ConfigError(f"policy={path}: there is no such file")
    try:
        content = plain_yaml(file)
    except (OSError, ValueError, YAMLError) as error:
        hint = "; a glob that begins with * must be in quotes" if isinstance(error, YAMLError) else ""
        raise ConfigError(f"policy={path}: cannot be read ({one_line(error)}{hint})") from error
    rules = content.get("rules")
    if list(content) != ["rules"] or not isinstance(rules, list):
        raise ConfigError(f"policy={path}: must hold the single key rules with a list of rules")
    return rules


def baseline_of(config: Config) -> Config:
    """Return the resolved config of the full-precision run in mode auto that is the baseline of a resolved config."""
    recipe = replace(config.recipe, **_WITHOUT_TEACHER, batchnorm_batches=0)
    changes = in_full_precision() | without_choice()
    changes |= dict.fromkeys((*OF_STAGE, "weights", "weights_part", "run_dir", "policy"))
    changes |= {"recipe": recipe, "mode": Mode.auto, "overwrite": False}
    return changed(config, **changes)


_WITHOUT_TEACHER: dict[str, Any] = {
    "distill": Distill.none,
    **dict.fromkeys(("teacher", "teacher_model", "teacher_part")),
}
"""Changes of a recipe that remove its teacher."""


def in_full_precision() -> dict[str, Any]:
    """Return the changes that turn a config into a full-precision one."""
    return {**dict.fromkeys(("bits", "weight_bits", "activation_bits"), FULL_PRECISION), "rules": []}


def without_choice() -> dict[str, Any]:
    """Return the changes that turn a config into one without bit allocation."""
    return {**dict.fromkeys((*LIMITS, "max_drop")), "retrain_steps": 0, "allocated": []}


def allocation_of(config: Config) -> Config:
    """Return the resolved config of the run in mode allocate that finds the policy of a resolved config with
    bits=auto."""
    changes: dict[str, Any] = dict.fromkeys((*OF_STAGE, "run_dir", "policy"))
    changes |= {"mode": Mode.allocate, "weights": config.weights or BASELINE, "overwrite": False}
    if not config.retrains_probes:  # otherwise the probes are trained like the run
        changes["recipe"] = replace(config.recipe, **_WITHOUT_TEACHER, freeze_scalars_at=None, batchnorm_batches=0)
        changes["oscillations"] = OscillationsConfig()
    return changed(config, **changes, allocated=[])


def trained_of(config: Config) -> Config:
    """Return the resolved config in mode retrain, with bits=auto, that shares all other keys with a resolved config in
    mode allocate.

    Raises:
        ConfigError: these keys are not a valid config in mode retrain.
    """
    return changed(config, **dict.fromkeys((*OF_STAGE, "run_dir")), mode=Mode.retrain, policy=AUTO)


def changed(config: Config, **changes: Any) -> Config:
    """Change values of a resolved config and resolve it again; null may stand for a value that follows from others."""
    return resolve(ConfigSchema(**_values(config) | changes))


def scaled_lr(stage: StageConfig, batch_size: int) -> float:
    """Scale the recipe's learning rate to another batch size: in proportion to it for SGD, and to its square root for
    AdamW."""
    ratio = batch_size / stage.batch_size
    return stage.lr * (math.sqrt(ratio) if stage.optimizer == Optimizer.adamw else ratio)


def check(config: Config) -> None:
    """Check that a resolved config is consistent.

    Raises:
        ConfigError: it is not; the message gives the key, the value and what is allowed.
    """
    check_values(config)
    require(config.accumulate <= config.batch_size, "accumulate", config.accumulate, "1 to batch_size")
    channels = {len(config.dataset.mean), len(config.dataset.std)}
    require(
        "dataset.mean" in foreign_keys(config.task) or (channels <= {1, 3} and len(channels) == 1),
        "dataset.mean",
        config.dataset.mean,
        "1 or 3 numbers, as many as dataset.std",
    )
    if config.dataset.decode == Decode.gpu and "dataset.decode" not in foreign_keys(config.task):
        require(
            config.dataset.resizing == Resizing.tensor,
            "dataset.resizing",
            config.dataset.resizing,
            "tensor with dataset.decode=gpu",
        )
    _check_quantization(config)
    _check_freezing(config)
    _check_oscillations(config)
    _check_compiling(config)
    _check_allocation(config)
    _check_mode(config)


def _check_quantization(config: Config) -> None:
    for key in ("weight_bits", "activation_bits", "first_last_bits"):
        bits = getattr(config, key)
        if bits is None:
            continue
        said = "bits" if bits == config.bits and key != "first_last_bits" else key
        allowed = f"{BITS.start} to {BITS.stop - 1}, or {FULL_PRECISION} for full precision"
        require(bits in BITS or bits == FULL_PRECISION, said, bits, allowed)
    _check_scalars(config)
    if config.needs_calibration or config.calibrates_probes:  # this also builds and checks the policy
        wanted = (
            f"clipping={config.clipping.name}"
            if config.clipping.learned
            else "clipping.dynamic=false"
            if not config.clipping.dynamic
            else f"clipping.eval_mode={config.clipping.eval_mode}"
        )
        require(
            config.clipping.calibration_batches > 0,
            "clipping.calibration_batches",
            config.clipping.calibration_batches,
            f"1 or more, since {wanted} needs data to calibrate its scalars",
        )


def _check_scalars(config: Config) -> None:
    """Reject keys without effect: those about solving if no scalar is solved for, and ranges that the method fixes."""
    clipping = config.clipping
    if config.quantization.full_precision:
        return
    if clipping.sync and (config.all_learned or config.all_static):
        what = "learned" if clipping.learned else "static"
        raise ConfigError(f"clipping.sync=true: applies only to scalars that are solved in training; these are {what}")
    if clipping.sync and clipping.refine:
        raise ConfigError(
            f"clipping.sync=true: cannot be combined with clipping.refine={clipping.refine}, which measures errors in "
            f"each process separately"
        )
    if clipping.sync and config.log_excess_mse:
        raise ConfigError(
            "clipping.sync=true: cannot be combined with log_excess_mse=true, which solves in each process separately"
        )
    if clipping.eval_mode != "dynamic" and config.all_learned:
        raise ConfigError(
            f"clipping.eval_mode={clipping.eval_mode}: applies only to solved scalars, not to learned ones"
        )
    for key in ("weight_range", "activation_range") if clipping.name == "pact" and config.all_learned else ():
        if (value := getattr(config, key)) != Range.TWOS_COMPLEMENT:
            said = "range" if config.range == value else key
            raise ConfigError(f"{said}={value}: cannot be set with clipping=pact, which has its own ranges")


def _check_freezing(config: Config) -> None:
    at = config.recipe.freeze_scalars_at
    if at is None or not config.training or config.quantization.full_precision:
        return
    require(0 < at < config.epochs, "recipe.freeze_scalars_at", at, f"above 0 and below epochs={config.epochs}")
    if config.all_learned or config.all_static:
        raise ConfigError(
            f"recipe.freeze_scalars_at={at:g}: clipping={config.clipping.name} has no dynamic scalars to freeze"
        )


def _check_oscillations(config: Config) -> None:
    how = config.oscillations
    if how.freeze_to is not None:
        require(
            how.freeze_from >= how.freeze_to,
            "oscillations.freeze_from",
            how.freeze_from,
            f"at least oscillations.freeze_to={how.freeze_to:g}",
        )


def _check_compiling(config: Config) -> None:
    if not config.compile:
        return
    for key, value, usual, why in (
        ("accumulate", config.accumulate, 1, "which keeps quantized weights between passes"),
        ("log_excess_mse", config.log_excess_mse, False, "which reads the state of quantizers"),
        ("clipping.sync", config.clipping.sync, False, "which waits for other processes within the network"),
        ("sync_batchnorm", config.sync_batchnorm, False, "which waits for other processes within the network"),
    ):
        if value != usual:
            raise ConfigError(f"compile=true: cannot be combined with {key}={str(value).lower()}, {why}")


def _check_allocation(config: Config) -> None:
    asked = config.limits | ({} if config.max_drop is None else {"max_drop": config.max_drop})
    if not config.allocating:
        for key, value in (asked | ({"retrain_steps": config.retrain_steps} if config.retrain_steps else {})).items():
            raise ConfigError(f"{key}={value:g}: applies only to qat-bits and bits=auto")
        return
    if config.mode == Mode.allocate and config.policy == AUTO:
        raise ConfigError("bits=auto: cannot be set with mode=allocate (qat-bits), which chooses bit-widths itself")
    how, what = config.allocation, "bits=auto" if config.policy == AUTO else "mode=allocate"
    wanted = f"{', '.join(LIMITS)} or max_drop"
    if not asked:
        raise ConfigError(f"{what}: needs a limit: {wanted}")
    if config.max_drop is not None and len(asked) > 1:
        raise ConfigError(
            f"max_drop={config.max_drop:g}: cannot be combined with {next(iter(asked))}, since it finds the cheapest "
            f"bit allocation itself"
        )
    if config.quantization.full_precision:
        said = f"weight_bits={config.weight_bits}, activation_bits={config.activation_bits}"
        raise ConfigError(f"{said}: {what} has nothing to choose, since nothing is quantized")
    require(len({*how.widths}) > 1, "allocation.widths", how.widths, "two or more different numbers")
    timed = config.latency_ms is not None or how.cost == "latency_ms"
    if timed and how.latencies is None:
        raise ConfigError("latency_ms: needs allocation.latencies=FILE, a file of measured latencies")
    if how.latencies is not None:
        latencies_of(how.latencies)
    if config.retrain_steps and config.recipe.retrain is None:
        raise ConfigError(f"retrain_steps={config.retrain_steps}: recipe={config.recipe.name} has no stage retrain")


def _check_mode(config: Config) -> None:
    from_scratch, from_checkpoint = config.mode == Mode.scratch, config.mode == Mode.finetune
    if not (from_scratch or from_checkpoint) and config.weights is None:
        raise ConfigError(
            f"mode={config.mode}: needs weights=PATH, weights=pretrained, weights=torchvision or weights=baseline"
        )
    if (from_scratch or from_checkpoint) and config.weights is not None:
        start = "random weights" if from_scratch else "model.checkpoint"
        raise ConfigError(
            f"weights={config.weights}: mode={config.mode} starts from {start}; use mode=retrain, ptq or evaluate"
        )
    if config.training and config.mode not in config.task.modes:
        allowed = ", ".join((*config.task.modes, "ptq", "allocate", "evaluate"))
        raise ConfigError(f"mode={config.mode}: must be one of {allowed} for dataset.task={config.dataset.task}")
    if config.mode == Mode.scratch and config.quantization.has_static:
        in_rules = config.clipping.dynamic or config.clipping.learned
        said = "rules.dynamic=false" if in_rules else f"clipping=static_{config.clipping.name} (clipping.dynamic=false)"
        raise ConfigError(f"{said}: mode=scratch has no trained weights to calibrate on; use mode=retrain")
    for key, part, value in (
        ("weights", config.weights_part, config.weights),
        ("recipe.teacher", config.recipe.teacher_part, config.recipe.teacher),
    ):
        if part is not None and value in (None, PRETRAINED, TORCHVISION, BASELINE):
            raise ConfigError(
                f"{key}_part={part}: applies only to a file, not to {key}={'null' if value is None else value}"
            )
    if (other := config.recipe.teacher_model) is not None:
        if config.recipe.teacher is None:
            raise ConfigError(
                f"recipe.teacher_model={other}: needs its weights, recipe.teacher=PATH or recipe.teacher=pretrained"
            )
        if "model.stem" in foreign_keys(config.task):
            raise ConfigError(
                f"recipe.teacher_model={other}: applies only to images, not to dataset.task={config.dataset.task}"
            )
    if config.distilling and (config.recipe.teacher or config.weights) is None:
        raise ConfigError("recipe.distill=full_precision: needs recipe.teacher=PATH, the weights of the teacher")
    if config.mode == Mode.ptq and config.quantization.full_precision:
        raise ConfigError(
            f"bits={config.bits}: mode=ptq has nothing to quantize; mode=evaluate gives the full-precision accuracy"
        )
