"""The schema of configs/: every key of a run, typed, with unit and meaning.

A `Config` as composed by Hydra may leave out what follows from the rest (bits of weights, epochs, ...). `resolve` fills
that in, and `check` refuses what cannot be meant, before any work. A run's `config.yaml` is the resolved one.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from qat_runner.errors import ConfigError
from qat_runner.insertion.policy import FULL_PRECISION, GRADIENT_PAIRS, GRANULARITIES, Policy
from qat_runner.quant import BITS, CLIPPING_METHODS, EVAL_MODES, LEARNED, LearnedQuantizer, Quantizer
from qat_runner.quant.kernels import BACKENDS

STAGES = ("scratch", "retrain", "long_retrain", "finetune")
MODES = (*STAGES, "ptq", "evaluate")
TEXT_DATASETS = ("squad",)
OPTIMIZERS = ("sgd", "adamw")
PADDINGS = ("max_length", "longest")
DISTILL = ("none", "full_precision")
RESUME = ("auto", "force", "never")
AMP = ("none", "bf16", "fp16")
SCHEDULES = ("step", "cosine", "linear")


@dataclass
class ModelConfig:
    name: str = MISSING
    """a name in qat_runner.models.MODELS or BERTS"""
    stem: str = "auto"
    """auto (by picture size), imagenet (as published) or small (first strides 1, no max pooling)"""
    width: float = 1.0
    """channels of a MobileNet, as a multiple of the published ones; without effect on ResNets"""
    checkpoint: str | None = None
    """pretrained BERT: a folder as transformers writes it, or a name on the Hugging Face hub"""


@dataclass
class DatasetConfig:
    name: str = MISSING
    """a name in qat_runner.data.DATASETS"""
    num_classes: int | None = None
    """pictures: classes; null: as many as there are class folders"""
    image_size: int = 0
    """pictures: pixels a side of what the network sees"""
    mean: list[float] = field(default_factory=list)
    """pictures: normalization, a number a channel, of values in 0..1"""
    std: list[float] = field(default_factory=list)
    """pictures: normalization, a number a channel, of values in 0..1"""
    augment: str = "none"
    """of training pictures held in memory: none, crop or crop_flip; folders of pictures get ImageNet's"""
    val_batch_size: int = 500
    """samples a validation batch; dynamic activation scalars are solved on each, so it is part of the result"""
    workers: int = 4
    """decoding processes (folders of pictures only)"""
    skip_corrupt: bool = False
    """folders of pictures: leave out those that cannot be decoded, and count them, instead of stopping"""
    fake_pictures: int = 512
    """training pictures of dataset=fake"""
    max_length: int = 384
    """text: tokens a window, question, part of the paragraph and special tokens together"""
    stride: int = 128
    """text: tokens of the paragraph from the start of a window to that of the next"""
    padding: str = "max_length"
    """text: pad a batch to max_length, or to its longest window: faster, but dynamic scalars see less padding"""
    one_window: bool = False
    """text: leave out questions that take more than one window, for short trials"""
    train_questions: int | None = None
    """text: at most so many training questions, spread evenly over the file; null: all"""
    val_questions: int | None = None
    """text: at most so many validation questions, spread evenly over the file; null: all"""
    n_best: int = 20
    """text: starts and ends of a window that may become the answer"""
    max_answer_length: int = 30
    """text: tokens of an answer"""


@dataclass
class ClippingConfig:
    name: str = MISSING
    """octav, max, percentile, mse_sweep, lsq or pact"""
    dynamic: bool = True
    """solve scalars on each call, or calibrate once and hold them"""
    iterations: int | None = None
    """octav: reads of a tensor a solution, from cold"""
    warm_iterations: int | None = None
    """octav: at most so many reads a training step, from the previous step's scalar; null: from cold each time"""
    q: float | None = None
    """percentile: q of the q-th percentile of |x|, in percent"""
    points: int | None = None
    """mse_sweep: candidates"""
    together: bool | None = None
    """mse_sweep: rows of a weight share one candidate, as in the paper"""
    alpha: float | None = None
    """pact: the first clipping scalar of activations"""
    calibration_batches: int | None = None
    """training batches that static scalars (and eval_mode running or frozen without training) are calibrated on; null:
    5, of a BERT 10, as in the paper"""
    sync: bool = False
    """of several processes: solve activation scalars in training on the batch of all together (dynamic octav and max);
    otherwise each on its own part, as in the paper"""
    eval_mode: str = "dynamic"
    """activation scalars in evaluation: dynamic (solved on each batch), running (their average) or frozen (the last)"""

    def options(self) -> dict[str, Any]:
        """What is passed to the clipping method."""
        options = {name: getattr(self, name) for name in ("iterations", "q", "points", "together", "alpha")}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def learned(self) -> bool:
        """Whether scalars are parameters, with gradients of their own."""
        return self.name in LEARNED


@dataclass
class GradientConfig:
    name: str = MISSING
    """ste, pwl, mad or mph"""


@dataclass
class StageConfig:
    """How one stage, from scratch or retraining or fine-tuning, is trained."""

    epochs: int = MISSING
    batch_size: int = MISSING
    """samples a step, over all devices"""
    lr: float = MISSING
    """learning rate at that batch size, before any decay"""
    optimizer: str = "sgd"
    """sgd, or adamw, which spares biases and normalization the weight decay"""
    momentum: float = 0.9
    """sgd"""
    weight_decay: float = 1e-4
    nesterov: bool = False
    """sgd"""
    max_grad_norm: float | None = None
    """gradients are scaled down to this norm, over all parameters; null: never"""
    label_smoothing: float = 0.0
    """0 to below 1"""
    schedule: str = "step"
    """step: times decay_factor every decay_every epochs; cosine, linear: to zero over the epochs"""
    decay_every: int = 30
    """epochs"""
    decay_factor: float = 0.1
    warmup_epochs: float = 0.0
    """epochs, or a part of one, of linear rise at the start"""


@dataclass
class RecipeConfig:
    """The full-precision recipe of a network on a data set, a stage a mode; quantized runs use it unmodified."""

    name: str = MISSING
    scratch: StageConfig | None = None
    retrain: StageConfig | None = None
    long_retrain: StageConfig | None = None
    finetune: StageConfig | None = None
    distill: str = "none"
    """none, or full_precision: learn from the logits of the full-precision network in `teacher` as well"""
    teacher: str | None = None
    """weights file of that network, as `weights`; null: `weights` themselves"""
    distill_temperature: float = 4.0
    """what logits of both are divided by, above 0"""
    distill_weight: float = 0.5
    """share of the teacher in the loss, above 0 to 1; the labels have the rest"""


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    clipping: ClippingConfig = field(default_factory=ClippingConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    mode: str = "auto"
    """scratch: train from random weights; finetune: a BERT from its checkpoint; retrain, long_retrain: from `weights`;
    ptq: quantize `weights`; evaluate: as it is; auto: finetune for a BERT, else scratch"""
    weights: str | None = None
    """.pt, .pth, .th or .safetensors file; "torchvision" for the published weights; "baseline" for the full-precision
    run of the same network, data, recipe and seed in mode auto, which is made first where it is missing"""

    bits: int = 4
    """bits of weights and activations, 2 to 16; 32 is the full-precision baseline"""
    weight_bits: int | None = None
    """bits of weights; null: bits"""
    activation_bits: int | None = None
    """bits of activations; null: bits"""
    first_last_bits: int | None = None
    """bits of the first convolution and the last linear layer, weights and inputs; null: 8; a BERT has no such ends"""
    conv_granularity: str = "channel"
    """clipping scalars of a convolution weight: channel (one per output channel) or tensor"""
    linear_granularity: str = "auto"
    """clipping scalars of a linear weight: channel (one per output feature) or tensor; auto: channel in a BERT"""

    epochs: int | None = None
    """null: the recipe's"""
    batch_size: int | None = None
    """null: the recipe's"""
    lr: float | None = None
    """null: the recipe's, in proportion to batch_size where that is not the recipe's"""
    accumulate: int = 1
    """parts that each batch is computed in, gradients adding up: less memory for the same batch size"""
    seed: int = 0
    """of initialization, data order and augmentation; 0 to 2^32 - 1"""
    backend: str = "auto"
    """of the quantization kernels: auto, eager (plain PyTorch), compiled (C++, CPU) or triton (CUDA)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    amp: str = "none"
    """none, bf16 or fp16: autocast of convolutions and matrix products"""
    channels_last: bool = True
    """memory layout of weights and pictures: the faster one, on CPUs as on GPUs"""
    limit_train_batches: int | None = None
    """at most so many batches an epoch; null: all"""
    limit_val_batches: int | None = None
    """at most so many validation batches; null: all"""
    noise_batches: int = 1
    """validation batches on which quantization noise is measured after each epoch; 0: never"""

    sync_batchnorm: bool = False
    """of several processes: BatchNorm over the batch of all together"""
    distributed_timeout: float = 600.0
    """of several processes: seconds after which one that waits for another gives up"""
    checkpoint_minutes: float = 10.0
    """a checkpoint is written so often, and at the end of each epoch"""

    sweep: dict[str, str] = field(default_factory=dict)
    """of an experiment: what -m sweeps over, unless the command line names the key"""
    standins: dict[str, str] = field(default_factory=dict)
    """of a scale: what takes the place of values in `sweep`"""

    fingerprints: dict[str, str] = field(default_factory=dict)
    """of the files and folders that this config names, as a run found them; filled in by the runner"""

    log_excess_mse: bool = False
    """add to steps.csv what warm-started scalars cost in MSE over converged ones (slow)"""

    data_dir: str = "data"
    """where data sets lie; by default the environment variable QAT_DATA_DIR, else ./data"""
    runs_dir: str = "runs"
    """where run folders are made"""
    run_dir: str | None = None
    """this run's folder; null: a folder in runs_dir named after the config"""
    overwrite: bool = False
    """start anew where the run folder exists; otherwise a finished run is shown and an unfinished one resumed"""
    resume: str = "auto"
    """auto: go on with an unfinished run of the same config; force: of another config, too; never: refuse"""

    @property
    def training(self) -> bool:
        return self.mode in STAGES

    @property
    def reads_text(self) -> bool:
        """Whether the network is a BERT, going by the data."""
        return self.dataset.name in TEXT_DATASETS

    @property
    def retraining(self) -> bool:
        return self.mode in ("retrain", "long_retrain")

    @property
    def stage(self) -> StageConfig:
        """The recipe's stage that this mode uses; one that does not train takes its batch size from mode auto's.

        Raises:
            ConfigError: the recipe has none.
        """
        mode = self.mode if self.training else self._auto_mode
        stage: StageConfig | None = getattr(self.recipe, mode)
        if stage is None:
            has = ", ".join(name for name, _ in _stages(self))
            raise ConfigError(f"mode={mode}: recipe={self.recipe.name} has no such stage, only {has}")
        return stage

    @property
    def _auto_mode(self) -> str:
        return "finetune" if self.reads_text else "scratch"

    @property
    def distilling(self) -> bool:
        return self.training and self.recipe.distill != "none"

    def content(self, path: str) -> str:
        """A fingerprint of what is at a path, as the run found it, or as it is now."""
        return self.fingerprints.get(path) or _content(path)

    def with_fingerprints(self) -> "Config":
        """With `fingerprints` of all that it names: what a run's config.yaml holds, so that files may move later."""
        named = {self.weights, self.recipe.teacher, self.model.checkpoint} - {None, BASELINE}
        return replace(self, fingerprints={path: self.content(path) for path in sorted(filter(None, named))})

    @property
    def policy(self) -> Policy:
        """Of a resolved config."""
        assert self.weight_bits is not None and self.activation_bits is not None
        return Policy(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            first_last_bits=self.first_last_bits,
            clipping=self.clipping.name,
            clipping_options=self.clipping.options(),
            warm_iterations=self.clipping.warm_iterations,
            dynamic=self.clipping.dynamic,
            gradient=self.gradient.name,
            eval_mode=self.clipping.eval_mode,
            conv_granularity=self.conv_granularity,
            linear_granularity=self.linear_granularity,
            synchronize=self.clipping.sync,
            keep=(ANSWER_HEAD,) if self.reads_text else (),
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether scalars must be found on training batches before the first use."""
        held = (
            self.clipping.learned
            or not self.clipping.dynamic
            or (self.clipping.eval_mode != "dynamic" and self.mode == "ptq")
        )
        return held and self.mode != "evaluate" and not self.policy.full_precision


def register() -> None:
    """Make the schema known to Hydra, as config `schema`."""
    ConfigStore.instance().store(name="schema", node=Config)


def from_hydra(composed: DictConfig) -> Config:
    """A composed config -> a resolved and checked one.

    Raises:
        ConfigError: a contradiction, or a value out of range.
    """
    try:
        config = OmegaConf.to_object(composed)
    except Exception as error:  # omegaconf: a missing value, an interpolation that leads nowhere
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(config, Config)
    for key in _unknown_keys(config):
        raise ConfigError(f"unknown key '{key}'; qat-run --help lists all keys")
    return resolve(config)


def _unknown_keys(config: Any, prefix: str = "") -> list[str]:
    """Keys that were added by force (+key=value) and mean nothing."""
    known = {f.name for f in fields(config)}
    unknown = [prefix + key for key in vars(config) if key not in known]
    for key in known:
        if is_dataclass(getattr(config, key)):
            unknown += _unknown_keys(getattr(config, key), f"{prefix}{key}.")
    return unknown


def resolve(config: Config) -> Config:
    """Fill in what follows from the rest, and check the result."""
    _require(config.mode in ("auto", *MODES), "mode", config.mode, f"one of {', '.join(('auto', *MODES))}")
    text = config.reads_text
    config = replace(config, mode=config._auto_mode if config.mode == "auto" else config.mode)
    stage = config.stage
    batch_size = stage.batch_size if config.batch_size is None else config.batch_size
    clipping = config.clipping
    if clipping.calibration_batches is None:
        clipping = replace(clipping, calibration_batches=10 if text else 5)
    granularity = config.linear_granularity
    config = replace(
        config,
        clipping=clipping,
        first_last_bits=8 if config.first_last_bits is None and not text else config.first_last_bits,
        linear_granularity=("channel" if text else "tensor") if granularity == "auto" else granularity,
        weight_bits=config.bits if config.weight_bits is None else config.weight_bits,
        activation_bits=config.bits if config.activation_bits is None else config.activation_bits,
        epochs=stage.epochs if config.epochs is None else config.epochs,
        batch_size=batch_size,
        lr=scaled_lr(stage, batch_size) if config.lr is None else config.lr,
    )
    check(config)
    return config


def scaled_lr(stage: StageConfig, batch_size: int) -> float:
    """The recipe's learning rate at another batch size: in proportion to it for SGD, to its square root for AdamW."""
    ratio = batch_size / stage.batch_size
    return stage.lr * (math.sqrt(ratio) if stage.optimizer == "adamw" else ratio)


def check(config: Config) -> None:
    """Refuse a resolved config that cannot be meant.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    names: list[tuple[str, str, Sequence[str]]] = [
        ("amp", config.amp, AMP),
        ("backend", config.backend, ("auto", *BACKENDS)),
        ("resume", config.resume, RESUME),
        ("gradient.name", config.gradient.name, tuple(GRADIENT_PAIRS)),
        ("clipping.name", config.clipping.name, (*CLIPPING_METHODS, *LEARNED)),
        ("clipping.eval_mode", config.clipping.eval_mode, EVAL_MODES),
        ("conv_granularity", config.conv_granularity, GRANULARITIES),
        ("linear_granularity", config.linear_granularity, GRANULARITIES),
        *((f"recipe.{name}.schedule", stage.schedule, SCHEDULES) for name, stage in _stages(config)),
        *((f"recipe.{name}.optimizer", stage.optimizer, OPTIMIZERS) for name, stage in _stages(config)),
        ("dataset.padding", config.dataset.padding, PADDINGS),
        ("recipe.distill", config.recipe.distill, DISTILL),
    ]
    for key, value, allowed in names:
        _require(value in allowed, key, value, f"one of {', '.join(allowed)}")
    counts: list[tuple[str, int | None, int]] = [
        ("epochs", config.epochs, 1),
        ("batch_size", config.batch_size, 1),
        ("seed", config.seed, 0),
        ("noise_batches", config.noise_batches, 0),
        ("limit_train_batches", config.limit_train_batches, 1),
        ("limit_val_batches", config.limit_val_batches, 1),
        ("dataset.image_size", None if config.reads_text else config.dataset.image_size, 1),
        ("dataset.max_length", config.dataset.max_length, 8),
        ("dataset.stride", config.dataset.stride, 1),
        ("dataset.train_questions", config.dataset.train_questions, 1),
        ("dataset.val_questions", config.dataset.val_questions, 1),
        ("dataset.n_best", config.dataset.n_best, 1),
        ("dataset.max_answer_length", config.dataset.max_answer_length, 1),
        ("dataset.num_classes", config.dataset.num_classes, 2),
        ("dataset.val_batch_size", config.dataset.val_batch_size, 1),
        ("dataset.workers", config.dataset.workers, 0),
        ("dataset.fake_pictures", config.dataset.fake_pictures, 2),
        ("clipping.calibration_batches", config.clipping.calibration_batches, 0),
        ("clipping.warm_iterations", config.clipping.warm_iterations, 1),
        *((f"recipe.{name}.decay_every", stage.decay_every, 1) for name, stage in _stages(config)),
    ]
    for name, count, least in counts:
        _require(count is None or count >= least, name, count, f"{least} or more")
    assert config.batch_size is not None
    _require(1 <= config.accumulate <= config.batch_size, "accumulate", config.accumulate, "1 to batch_size")
    _require(0 < config.model.width <= 4, "model.width", config.model.width, "above 0, at most 4")
    _require(config.seed < 2**32, "seed", config.seed, "below 2^32")
    assert config.lr is not None
    _require(0 < config.lr < float("inf"), "lr", config.lr, "a positive number")
    _require(config.checkpoint_minutes > 0, "checkpoint_minutes", config.checkpoint_minutes, "a positive number")
    _require(
        0 < config.distributed_timeout < 1e6, "distributed_timeout", config.distributed_timeout, "a positive number"
    )
    for name, stage in _stages(config):
        _require(0 < stage.decay_factor <= 1, f"recipe.{name}.decay_factor", stage.decay_factor, "above 0, at most 1")
        _require(
            0 <= stage.warmup_epochs < float("inf"), f"recipe.{name}.warmup_epochs", stage.warmup_epochs, "0 or more"
        )
        norm = stage.max_grad_norm
        _require(
            norm is None or 0 < norm < float("inf"), f"recipe.{name}.max_grad_norm", norm, "a positive number or null"
        )
        _require(0 <= stage.momentum < 1, f"recipe.{name}.momentum", stage.momentum, "at least 0 and below 1")
        _require(
            0 <= stage.label_smoothing < 1,
            f"recipe.{name}.label_smoothing",
            stage.label_smoothing,
            "at least 0 and below 1",
        )
        _require(0 <= stage.weight_decay < float("inf"), f"recipe.{name}.weight_decay", stage.weight_decay, "0 or more")
    _require(
        0 < config.recipe.distill_temperature < float("inf"),
        "recipe.distill_temperature",
        config.recipe.distill_temperature,
        "a positive number",
    )
    _require(
        0 < config.recipe.distill_weight <= 1,
        "recipe.distill_weight",
        config.recipe.distill_weight,
        "above 0, at most 1",
    )
    channels = {len(config.dataset.mean), len(config.dataset.std)}
    _require(
        config.reads_text or (channels <= {1, 3} and len(channels) == 1),
        "dataset.mean",
        config.dataset.mean,
        "as long as dataset.std, 1 or 3 numbers",
    )
    _require(all(s > 0 for s in config.dataset.std), "dataset.std", config.dataset.std, "positive numbers")
    _check_quantization(config)
    _check_mode(config)


def _check_quantization(config: Config) -> None:
    for key in ("weight_bits", "activation_bits", "first_last_bits"):
        bits = getattr(config, key)
        if bits is None:
            continue
        said = "bits" if bits == config.bits and key != "first_last_bits" else key
        allowed = f"{BITS.start} to {BITS.stop - 1}, or {FULL_PRECISION} for full precision"
        _require(bits in BITS or bits == FULL_PRECISION, said, bits, allowed)
    try:
        if config.clipping.learned:
            LearnedQuantizer(config.clipping.name, 8, **config.clipping.options())
        else:
            Quantizer(8, clipping=config.clipping.name, synchronize=config.clipping.sync, **config.clipping.options())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"clipping={config.clipping.name}: {error}") from error
    if config.needs_calibration:
        wanted = (
            f"clipping={config.clipping.name}"
            if config.clipping.learned
            else "clipping.dynamic=false"
            if not config.clipping.dynamic
            else f"clipping.eval_mode={config.clipping.eval_mode}"
        )
        assert config.clipping.calibration_batches is not None
        _require(
            config.clipping.calibration_batches > 0,
            "clipping.calibration_batches",
            config.clipping.calibration_batches,
            f"1 or more, since {wanted} needs data to calibrate its scalars",
        )


def _check_mode(config: Config) -> None:
    from_scratch, from_checkpoint = config.mode == "scratch", config.mode == "finetune"
    if not (from_scratch or from_checkpoint) and config.weights is None:
        raise ConfigError(f"mode={config.mode}: needs weights=PATH, weights=torchvision or weights=baseline")
    if (from_scratch or from_checkpoint) and config.weights is not None:
        start = "random weights" if from_scratch else "model.checkpoint"
        raise ConfigError(
            f"weights={config.weights}: mode={config.mode} starts from {start}; use mode=retrain, ptq or evaluate"
        )
    if from_checkpoint and not config.reads_text:
        raise ConfigError(
            f"mode=finetune: is for a BERT on {', '.join(TEXT_DATASETS)}; pictures have scratch and retrain"
        )
    if config.reads_text and config.model.checkpoint is None:
        raise ConfigError(f"model={config.model.name}: needs model.checkpoint=FOLDER or a name on the Hugging Face hub")
    if config.mode == "scratch" and config.needs_calibration and not config.clipping.learned:
        raise ConfigError(
            "clipping.dynamic=false: mode=scratch has no trained weights to calibrate on; mode=retrain has"
        )
    if config.distilling and (config.recipe.teacher or config.weights) is None:
        raise ConfigError("recipe.distill=full_precision: needs recipe.teacher=PATH, the weights of the teacher")
    if config.mode == "ptq" and config.policy.full_precision:
        raise ConfigError(
            f"bits={config.bits}: mode=ptq has nothing to quantize; mode=evaluate gives the full-precision accuracy"
        )


def _stages(config: Config) -> list[tuple[str, StageConfig]]:
    return [(name, stage) for name in STAGES if (stage := getattr(config.recipe, name)) is not None]


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={value}: must be {allowed}")


PLACES = (
    *("data_dir", "runs_dir", "run_dir", "overwrite", "resume", "sweep", "standins", "fingerprints"),
    *("checkpoint_minutes", "distributed_timeout"),
)
"""Keys that say where things lie and what is kept, not what is computed."""

BASELINE = "baseline"
"""The value of `weights` that stands for the run that `baseline_of` names."""

ANSWER_HEAD = "qa_outputs"
"""The layer of a BERT that finds answers; the paper quantizes the transformer blocks alone."""


def baseline_of(config: Config) -> Config:
    """The full-precision run in mode auto that goes with a resolved config, resolved."""
    recipe = replace(config.recipe, distill="none", teacher=None)
    changes: dict[str, Any] = dict.fromkeys(("bits", "weight_bits", "activation_bits"), FULL_PRECISION)
    changes |= dict.fromkeys(("epochs", "batch_size", "lr", "weights", "run_dir"))
    return resolve(replace(config, recipe=recipe, mode="auto", overwrite=False, **changes))


def identity(config: Config) -> dict[str, Any]:
    """The keys of a resolved config that decide its result: what is equal here is the same run.

    Weights count by content, wherever they lie. Clipping and gradient are no part of a full-precision run, nor is the
    recipe of one that does not train.
    """
    keys = {key: value for key, value in asdict(config).items() if key not in PLACES}
    del keys["bits"], keys["dataset"]["workers"]
    _drop_foreign(keys, config.reads_text)
    if config.reads_text and config.model.checkpoint is not None:
        keys["model"]["checkpoint"] = config.content(config.model.checkpoint)
    if config.weights is not None:
        baseline = config.weights == BASELINE
        keys["weights"] = run_name(baseline_of(config)) if baseline else config.content(config.weights)
    if config.dataset.name == "imagefolder":  # any folder of pictures goes by this name
        keys["data_dir"] = str(Path(config.data_dir).expanduser().resolve())
    keys["recipe"] = None
    if config.training:
        keys["recipe"] = asdict(config.stage)
    if config.distilling:
        teacher = config.recipe.teacher
        keys["distill"] = {
            "teacher": None if teacher is None else config.content(teacher),
            "temperature": config.recipe.distill_temperature,
            "weight": config.recipe.distill_weight,
        }
    if not config.training:
        for key in ("epochs", "lr", "accumulate", *([] if config.needs_calibration else ["batch_size"])):
            del keys[key]
    if config.policy.full_precision:
        for key in (
            "clipping",
            "gradient",
            "first_last_bits",
            "conv_granularity",
            "linear_granularity",
            "noise_batches",
        ):
            keys.pop(key, None)
    elif config.clipping.learned:
        del keys["gradient"]
    return keys


_OF_PICTURES = {
    "model": ("stem", "width"),
    "dataset": ("num_classes", "image_size", "mean", "std", "augment", "fake_pictures", "skip_corrupt"),
    "": ("channels_last", "conv_granularity"),
}
_OF_TEXT = {
    "model": ("checkpoint",),
    "dataset": (
        *("max_length", "stride", "padding", "one_window"),
        *("train_questions", "val_questions", "n_best", "max_answer_length"),
    ),
}
"""Keys, by group, that mean nothing to the other kind of network."""


def _drop_foreign(keys: dict[str, Any], reads_text: bool) -> None:
    for group, names in (_OF_PICTURES if reads_text else _OF_TEXT).items():
        for name in names:
            del (keys[group] if group else keys)[name]


def load_config(folder: Path) -> Config | None:
    """The config of the run that a folder holds; None if it holds none."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(folder / "config.yaml"))
        saved = OmegaConf.to_object(merged)
        assert isinstance(saved, Config)
        identity(saved)
    except Exception:  # no such file, no YAML, no config of ours
        return None
    return saved


def _content(weights: str) -> str:
    """A fingerprint of a weights file, or of a checkpoint's folder; its name where there is no such thing."""
    path = Path(weights).expanduser()
    if path.is_dir():
        parts = {file.name: _content(str(file)) for file in sorted(path.iterdir()) if file.suffix in _CHECKPOINT_FILES}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if not path.is_file():
        return weights
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


_CHECKPOINT_FILES = (".json", ".txt", ".safetensors", ".bin")


@functools.lru_cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Of a file, read once for as long as it stays the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_name(config: Config) -> str:
    """A folder name that tells the main choices, and a fingerprint of all others."""
    fingerprint = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    return "_".join(
        [
            config.model.name,
            config.dataset.name,
            config.mode,
            *_quantization_words(config),
            f"seed{config.seed}",
            fingerprint,
        ]
    )


def _quantization_words(config: Config) -> list[str]:
    if config.policy.full_precision:
        return ["fp32"]
    same = config.weight_bits == config.activation_bits
    bits = f"{config.weight_bits}bit" if same else f"w{config.weight_bits}a{config.activation_bits}"
    distilled = ["distilled"] if config.distilling else []
    return [bits, clipping_label(config), *([] if config.clipping.learned else [config.gradient.name]), *distilled]


def clipping_label(config: Config) -> str:
    """The clipping method in one word, e.g. octav, static-percentile99.9; "none" for full precision."""
    if config.policy.full_precision:
        return "none"
    suffix = "" if config.clipping.q is None else f"{config.clipping.q:g}"
    held = not config.clipping.dynamic and not config.clipping.learned
    return ("static-" if held else "") + config.clipping.name + suffix


def gradient_label(config: Config) -> str:
    """The gradient estimator in one word; that of lsq and pact is their own."""
    return "none" if config.policy.full_precision else "own" if config.clipping.learned else config.gradient.name


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested configs differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found
