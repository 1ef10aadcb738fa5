"""From a config as Hydra composes it to one that is complete and makes sense, or a sentence why it does not.

A `Config` as composed may leave out what follows from the rest (bits of weights, epochs, ...). `resolve` fills that in,
and `check` refuses what cannot be meant, before any work. A run's `config.yaml` is the resolved one.
"""

import json
import math
import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from qat_runner.config.allowed import check_values, require
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
from qat_runner.errors import ConfigError, told
from qat_runner.plugins import later
from qat_runner.policy import FULL_PRECISION
from qat_runner.quant import BITS, METHODS, Range


def from_hydra(composed: DictConfig) -> Config:
    """A composed config -> a resolved and checked one.

    Raises:
        ConfigError: a contradiction, or a value out of range.
    """
    try:
        config = OmegaConf.to_object(composed)
    except Exception as error:  # omegaconf: a missing value, an interpolation that leads nowhere
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(config, ConfigSchema)
    for key in _unknown_keys(config):
        raise ConfigError(f"unknown key '{key}'; qat-run --help lists all keys")
    for key in ("allocated", "fingerprints"):
        if getattr(config, key):
            raise ConfigError(f"{key}: is filled in by the runner")
    require(config.schema_version == SCHEMA_VERSION, "schema_version", config.schema_version, f"{SCHEMA_VERSION}")
    resolved = resolve(config)
    _check_asked(config, resolved)
    return resolved


def _check_asked(config: ConfigSchema, resolved: Config) -> None:
    """Refuse keys without effect that only whoever asks can mean: in a config that follows from another one, or that an
    earlier version took, they may be, as may those about quantization in full precision.
    """
    if resolved.quantization.full_precision:
        return
    clipping = resolved.clipping
    if clipping.sync and resolved.mode in (Mode.ptq, Mode.evaluate):
        raise ConfigError(f"clipping.sync=true: is for training, and mode={resolved.mode} does none")
    if clipping.dynamic and clipping.learned and clipping.name in METHODS.own:
        raise ConfigError(f"clipping.dynamic=true: clipping={clipping.name} learns its scalars")
    for key in OF_STAGE if resolved.mode == Mode.allocate else ():
        if (value := getattr(config, key)) is not None:
            raise ConfigError(
                f"{key}={value}: mode=allocate trains nothing by it; retrain_steps says how long networks are "
                f"retrained, recipe.retrain.lr and recipe.retrain.batch_size how"
            )
    for key, usual in _CHOSEN.items() if config.allocating else ():
        if (bits := getattr(config, key)) not in (usual, FULL_PRECISION):
            what = "bits=auto" if config.policy == AUTO else "mode=allocate"
            raise ConfigError(
                f"{key}={bits}: {what} chooses them; rules=[{{match: GLOB, bits: {bits}}}] exempts tensors"
            )


_CHOSEN = {"bits": ConfigSchema.bits, "weight_bits": None, "activation_bits": None}
"""Keys that say of how many bits all tensors are, and what they are where they are left out."""


def _unknown_keys(config: Any, prefix: str = "") -> list[str]:
    """Keys that were added by force (+key=value) and mean nothing."""
    known = {f.name for f in fields(config)}
    unknown = [prefix + key for key in vars(config) if key not in known]
    for key in known:
        if is_dataclass(getattr(config, key)):
            unknown += _unknown_keys(getattr(config, key), f"{prefix}{key}.")
    return unknown


def resolve(config: ConfigSchema) -> Config:
    """Fill in what follows from the rest, and check the result."""
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
    if resolved.policy == AUTO and resolved.quantization.full_precision:  # a row beside others
        resolved = replace(resolved, policy=None, **without_choice())
    check(resolved)
    return resolved


def _preprocessed(config: ConfigSchema) -> ConfigSchema:
    """With pictures as the model's library describes them, where that is asked for; keys that are given stay."""
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
"""Of a room above, and heavy: only configs that ask for it need it."""


def _resolved_clipping(config: ConfigSchema, task: TaskFacts) -> ClippingConfig:
    clipping = config.clipping
    usual = {
        "calibration_batches": task.calibration_batches,
        "calibration_batch_size": task.calibration_batch_size,
    }
    return ClippingConfig(**_values(clipping) | {key: n for key, n in usual.items() if getattr(clipping, key) is None})


def _values(config: Any) -> dict[str, Any]:
    """Field -> value, of a dataclass."""
    return {each.name: getattr(config, each.name) for each in fields(config)}


def _with_home(config: ConfigSchema) -> ConfigSchema:
    """With `~` as it is meant: a shell that sees `key=~/x` may leave it as it is."""
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
    """Measured latencies: layer -> bits of its operands -> milliseconds.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path_of(path).read_text(encoding="utf-8"))
        return {
            layer: {tuple(map(int, widths.split("x"))): _milliseconds(ms) for widths, ms in row.items()}
            for layer, row in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"allocation.latencies={path}: must be a JSON file of layer -> bits, such as 4x8 -> milliseconds "
            f"({told(error)})"
        ) from error


def _milliseconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no number of milliseconds")
    return float(value)


def rules_of(path: str) -> list[Any]:
    """The rules of a policy file, as yet unchecked.

    Raises:
        ConfigError: there is no such file, or it does not hold rules.
    """
    file = path_of(path)
    if not file.is_file():
        raise ConfigError(f"policy={path}: there is no such file")
    try:
        content = plain_yaml(file)
    except (OSError, ValueError, YAMLError) as error:
        hint = "; a glob that begins with * is written in quotes" if isinstance(error, YAMLError) else ""
        raise ConfigError(f"policy={path}: cannot be read ({told(error)}{hint})") from error
    rules = content.get("rules")
    if list(content) != ["rules"] or not isinstance(rules, list):
        raise ConfigError(f"policy={path}: must hold one key, rules, with a list of rules")
    return rules


def baseline_of(config: Config) -> Config:
    """The full-precision run in mode auto that goes with a resolved config, resolved."""
    recipe = replace(config.recipe, **_WITHOUT_TEACHER, batchnorm_batches=0)
    changes = in_full_precision() | without_choice()
    changes |= dict.fromkeys((*OF_STAGE, "weights", "weights_part", "run_dir", "policy"))
    changes |= {"recipe": recipe, "mode": Mode.auto, "overwrite": False}
    return changed(config, **changes)


_WITHOUT_TEACHER: dict[str, Any] = {
    "distill": Distill.none,
    **dict.fromkeys(("teacher", "teacher_model", "teacher_part")),
}
"""Changes of a recipe."""


def in_full_precision() -> dict[str, Any]:
    """The changes that make a config one of a full-precision run."""
    return {**dict.fromkeys(("bits", "weight_bits", "activation_bits"), FULL_PRECISION), "rules": []}


def without_choice() -> dict[str, Any]:
    """The changes that make a config one for which no bits are chosen."""
    return {**dict.fromkeys((*LIMITS, "max_drop")), "retrain_steps": 0, "allocated": []}


def allocation_of(config: Config) -> Config:
    """The run in mode allocate whose policy a resolved config with bits=auto takes, resolved."""
    changes: dict[str, Any] = dict.fromkeys((*OF_STAGE, "run_dir", "policy"))
    changes |= {"mode": Mode.allocate, "weights": config.weights or BASELINE, "overwrite": False}
    if not config.retrains_probes:  # else they are trained as the run is
        changes["recipe"] = replace(config.recipe, **_WITHOUT_TEACHER, freeze_scalars_at=None, batchnorm_batches=0)
        changes["oscillations"] = OscillationsConfig()
    return changed(config, **changes, allocated=[])


def trained_of(config: Config) -> Config:
    """The run in mode retrain, with bits=auto, of all keys of a resolved config of mode allocate, resolved.

    Raises:
        ConfigError: there is none.
    """
    return changed(config, **dict.fromkeys((*OF_STAGE, "run_dir")), mode=Mode.retrain, policy=AUTO)


def changed(config: Config, **changes: Any) -> Config:
    """A resolved config with other values, of which null may be what follows from the rest; resolved again."""
    return resolve(ConfigSchema(**_values(config) | changes))


def scaled_lr(stage: StageConfig, batch_size: int) -> float:
    """The recipe's learning rate at another batch size: in proportion to it for SGD, to its square root for AdamW."""
    ratio = batch_size / stage.batch_size
    return stage.lr * (math.sqrt(ratio) if stage.optimizer == Optimizer.adamw else ratio)


def check(config: Config) -> None:
    """Refuse a resolved config that cannot be meant.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    check_values(config)
    require(config.accumulate <= config.batch_size, "accumulate", config.accumulate, "1 to batch_size")
    channels = {len(config.dataset.mean), len(config.dataset.std)}
    require(
        "dataset.mean" in foreign_keys(config.task) or (channels <= {1, 3} and len(channels) == 1),
        "dataset.mean",
        config.dataset.mean,
        "as long as dataset.std, 1 or 3 numbers",
    )
    if config.dataset.decode == Decode.gpu and "dataset.decode" not in foreign_keys(config.task):
        require(
            config.dataset.resizing == Resizing.tensor,
            "dataset.resizing",
            config.dataset.resizing,
            "tensor where dataset.decode=gpu",
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
    if config.needs_calibration or config.calibrates_probes:  # to know that takes the whole policy, which checks itself
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
    """Refuse what would have no effect: keys about solving where nothing is solved, and ranges where they are given."""
    clipping = config.clipping
    if config.quantization.full_precision:
        return
    if clipping.sync and (config.all_learned or config.all_static):
        what = "learned" if clipping.learned else "static"
        raise ConfigError(f"clipping.sync=true: is for scalars that are solved in training, and these are {what}")
    if clipping.sync and clipping.refine:
        raise ConfigError(
            f"clipping.sync=true: is not for clipping.refine={clipping.refine}, which measures by process"
        )
    if clipping.sync and config.log_excess_mse:
        raise ConfigError("clipping.sync=true: is not for log_excess_mse=true, which solves anew by process")
    if clipping.eval_mode != "dynamic" and config.all_learned:
        raise ConfigError(f"clipping.eval_mode={clipping.eval_mode}: is for scalars that are solved, not learned")
    for key in ("weight_range", "activation_range") if clipping.name == "pact" and config.all_learned else ():
        if (value := getattr(config, key)) != Range.TWOS_COMPLEMENT:
            said = "range" if config.range == value else key
            raise ConfigError(f"{said}={value}: clipping=pact has ranges of its own")


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
            f"at least freeze_to={how.freeze_to:g}",
        )


def _check_compiling(config: Config) -> None:
    if not config.compile:
        return
    for key, value, usual, why in (
        ("accumulate", config.accumulate, 1, "which keeps quantized weights between passes"),
        ("log_excess_mse", config.log_excess_mse, False, "which looks into quantizers"),
        ("clipping.sync", config.clipping.sync, False, "which waits for other processes within the network"),
        ("sync_batchnorm", config.sync_batchnorm, False, "which waits for other processes within the network"),
    ):
        if value != usual:
            raise ConfigError(f"compile=true: is not for {key}={str(value).lower()}, {why}")


def _check_allocation(config: Config) -> None:
    asked = config.limits | ({} if config.max_drop is None else {"max_drop": config.max_drop})
    if not config.allocating:
        for key, value in (asked | ({"retrain_steps": config.retrain_steps} if config.retrain_steps else {})).items():
            raise ConfigError(f"{key}={value:g}: is for qat-bits and for bits=auto")
        return
    if config.mode == Mode.allocate and config.policy == AUTO:
        raise ConfigError("bits=auto: mode=allocate, which is what qat-bits does, chooses bits by itself")
    how, what = config.allocation, "bits=auto" if config.policy == AUTO else "mode=allocate"
    wanted = f"{', '.join(LIMITS)} or max_drop"
    if not asked:
        raise ConfigError(f"{what}: needs to be told what bits may cost: {wanted}")
    if config.max_drop is not None and len(asked) > 1:
        raise ConfigError(
            f"max_drop={config.max_drop:g}: seeks the least bits by itself; no {next(iter(asked))} beside it"
        )
    if config.quantization.full_precision:
        said = f"weight_bits={config.weight_bits}, activation_bits={config.activation_bits}"
        raise ConfigError(f"{said}: {what} has nothing to choose bits for")
    require(len({*how.widths}) > 1, "allocation.widths", how.widths, "two or more different numbers")
    timed = config.latency_ms is not None or how.cost == "latency_ms"
    if timed and how.latencies is None:
        raise ConfigError("latency_ms: needs allocation.latencies=FILE, which says what was measured")
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
        raise ConfigError(f"{said}: mode=scratch has no trained weights to calibrate on; mode=retrain has")
    for key, part, value in (
        ("weights", config.weights_part, config.weights),
        ("recipe.teacher", config.recipe.teacher_part, config.recipe.teacher),
    ):
        if part is not None and value in (None, PRETRAINED, TORCHVISION, BASELINE):
            raise ConfigError(f"{key}_part={part}: is for a file, not for {key}={'null' if value is None else value}")
    if (other := config.recipe.teacher_model) is not None:
        if config.recipe.teacher is None:
            raise ConfigError(f"recipe.teacher_model={other}: needs recipe.teacher=PATH or pretrained, its weights")
        if "model.stem" in foreign_keys(config.task):
            raise ConfigError(
                f"recipe.teacher_model={other}: is for pictures, not for dataset.task={config.dataset.task}"
            )
    if config.distilling and (config.recipe.teacher or config.weights) is None:
        raise ConfigError("recipe.distill=full_precision: needs recipe.teacher=PATH, the weights of the teacher")
    if config.mode == Mode.ptq and config.quantization.full_precision:
        raise ConfigError(
            f"bits={config.bits}: mode=ptq has nothing to quantize; mode=evaluate gives the full-precision accuracy"
        )
