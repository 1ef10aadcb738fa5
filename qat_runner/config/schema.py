"""The schema of configs/: every key of a run, with its type, range, unit and meaning.

`ConfigSchema` is what Hydra composes; keys that follow from others may be null in it. `Config` is the resolved config,
which all other packages receive.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar

from omegaconf import MISSING

from qat_runner.config.fingerprints import fingerprint
from qat_runner.config.keys import number, path, within
from qat_runner.config.model_names import checkpoint_of
from qat_runner.config.tasks import FACTS, TaskFacts, foreign_keys
from qat_runner.config.versions import SCHEMA_VERSION
from qat_runner.errors import ConfigError
from qat_runner.policy import Policy, Rule, estimator_of
from qat_runner.quant import METHODS, ClippingMethod, Estimator, Octav, clipping_method
from qat_runner.wording import one_of


class Mode(StrEnum):
    """What a run does."""

    auto = "auto"
    scratch = "scratch"
    retrain = "retrain"
    long_retrain = "long_retrain"
    finetune = "finetune"
    ptq = "ptq"
    allocate = "allocate"
    evaluate = "evaluate"


class Optimizer(StrEnum):
    """The optimizer of a stage."""

    sgd = "sgd"
    adamw = "adamw"


class Spared(StrEnum):
    """The parameters that AdamW excludes from weight decay."""

    vectors = "vectors"
    tokens = "tokens"


class Schedule(StrEnum):
    """How the learning rate decays."""

    step = "step"
    cosine = "cosine"
    linear = "linear"


class Padding(StrEnum):
    """How token windows are padded."""

    max_length = "max_length"
    longest = "longest"


class Resizing(StrEnum):
    """What resizes the images of image folders."""

    pillow = "pillow"
    tensor = "tensor"


class Decode(StrEnum):
    """Where the images of image folders are decoded."""

    cpu = "cpu"
    gpu = "gpu"


class Interpolation(StrEnum):
    """How pixels are interpolated when images are resized."""

    nearest = "nearest"
    bilinear = "bilinear"
    bicubic = "bicubic"


class Preprocessing(StrEnum):
    """What determines the size and normalization of images."""

    auto = "auto"
    dataset = "dataset"
    model = "model"


class Distill(StrEnum):
    """What a network learns from in addition to the labels."""

    none = "none"
    full_precision = "full_precision"


class Amp(StrEnum):
    """The type that convolutions and matrix multiplications are cast to."""

    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    """What happens to an unfinished run."""

    auto = "auto"
    force = "force"
    never = "never"


STAGES = (Mode.scratch, Mode.retrain, Mode.long_retrain, Mode.finetune)
"""The modes that train; each is a stage of the recipe."""

MIXED = "mixed"
"""The word for rules in records and in names of run folders."""

OF_STAGE = ("epochs", "batch_size", "lr")
"""The keys that default to the values of the recipe's stage."""

TORCHVISION = "torchvision"
"""The value of `weights` that selects torchvision's published weights."""
PRETRAINED = "pretrained"
"""The value of `weights` that selects the weights published by the model's own library."""
BASELINE = "baseline"
"""The value of `weights` that selects the result of the run that `baseline_of` returns."""
WORDS_OF_WEIGHTS = (TORCHVISION, PRETRAINED, BASELINE)
"""Values of `weights` that are never paths, even if a file of that name exists."""
AUTO = "auto"
"""The value of `policy` that selects the result of the run that `allocation_of` returns."""
LIMITS = ("budget", "size_mb", "bitops", "traffic_mb", "latency_ms")
"""The keys that limit the total cost of a bit allocation."""


_EPOCHS = 100_000
_SAMPLES = 1_000_000
_BATCHES = 1_000_000_000
_TOKENS = 100_000
_LARGE = 1e30  # the largest float32 is 3e38


class _Strict:
    """A group of keys that rejects unknown keys when it is read from a file, see `description`."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "coerce_numbers_to_str": True}


@dataclass
class ModelConfig(_Strict):
    """The network."""

    name: str = MISSING
    """Network: a name in qat_runner.models.MODELS, BERTS or DECODERS, or `torchvision/NAME`, `timm/NAME`, `hf/FOLDER`
    or `hf/NAME`; see the page about models."""
    stem: str = "auto"
    """First layers of the network: `imagenet` (as published) or `small` (first strides 1, no max pooling); `auto`
    chooses by `dataset.image_size`."""
    width: float = number(1.0, 0, 4, above=True)
    """Number of channels of a MobileNet, as a multiple of the published number; no effect on ResNets."""
    stride_in: str = "3x3"
    """Convolution of a ResNet bottleneck that has the stride: `3x3` (the second, as in torchvision) or `1x1` (the
    first, as published, and in weights from Caffe and Keras). Weights load with either value, but only the one that
    they were trained with gives their accuracy."""
    bn_eps: float | None = number(None, 0, 1, above=True)
    """Epsilon of every BatchNorm, for weights that were trained with another one: 1.001e-5 in the ResNets of Keras,
    1e-3 in many TensorFlow networks; null: the network's own, usually 1e-5."""
    checkpoint: str | None = path(None)
    """Checkpoint of a text model: a folder in the format of transformers, or a name on the Hugging Face hub. For a
    decoder in mode `scratch`, its configuration and tokenizer are enough."""


@dataclass
class DatasetConfig(_Strict):
    """The data set and how it is read."""

    name: str = MISSING
    """Data set: a name in qat_runner.data.DATASETS."""
    task: str = "classification"
    """Task of the data set: `classification`, `question_answering` or `language_modelling`; it follows from the
    name."""
    num_classes: int | None = number(None, 2, 100_000)
    """Images: number of classes; null: as many as the folder has."""
    image_size: int = number(0, 1, 8192)
    """Images: side length of the network's input, in pixels."""
    mean: list[float] = field(default_factory=list, metadata=within(-1e6, 1e6))
    """Images: mean for the normalization, one number per channel, for values in 0..1."""
    std: list[float] = field(default_factory=list, metadata=within(0, 1e6, above=True))
    """Images: standard deviation for the normalization, one number per channel, for values in 0..1."""
    augment: str = "none"
    """Augmentation of training images that are held in memory: `none`, `crop` or `crop_flip`. Image folders always get
    the ImageNet augmentation."""
    val_batch_size: int = number(500, 1, _SAMPLES)
    """Samples per validation batch. Dynamic clipping scalars of activations are solved on each batch, so this value
    affects the result."""
    workers: int = number(4, 0, 1024)
    """Image folders: number of worker processes that decode images."""
    skip_corrupt: bool = False
    """Image folders: skip and count images that cannot be decoded, instead of stopping."""
    resizing: Resizing = Resizing.pillow
    """Image folders: resize with `pillow`, as the published recipes do, or as a `tensor`, which is faster but may
    change a byte by 1."""
    decode: Decode = Decode.cpu
    """Image folders: decode JPEGs in the worker processes (`cpu`), or on the GPU that trains (`gpu`), where all images
    are then also resized; `gpu` requires `dataset.resizing=tensor`. The GPU decoder rounds differently, so the result
    is a different run."""
    interpolation: Interpolation = Interpolation.bilinear
    """Interpolation for resizing images: `nearest`, `bilinear` or `bicubic`."""
    resize_size: int | None = number(None, 1, 16384)
    """Image folders: length of the shorter side, in pixels, that a validation image is resized to before the center
    crop; null: 256/224 of `dataset.image_size`."""
    preprocessing: Preprocessing = Preprocessing.auto
    """Images: what determines `image_size`, `mean`, `std`, `interpolation` and `resize_size`. `dataset`: these keys.
    `model`: the values that the model's library states for the validation of its weights, except for keys that the
    command sets; images held in memory are enlarged to that size. `auto`: `model` if `weights=pretrained`, otherwise
    `dataset`."""
    fake_pictures: int = number(512, 2, 100_000)
    """Number of training images of `dataset=fake`."""
    max_length: int = number(384, 8, _TOKENS)
    """Text: tokens per window, which holds the question, a part of the paragraph and special tokens. For plain text:
    tokens per block."""
    stride: int = number(128, 1, _TOKENS)
    """Question answering: tokens of the paragraph between the starts of two consecutive windows."""
    padding: Padding = Padding.max_length
    """Question answering: pad a batch to `max_length`, or to its `longest` window, which is faster but lets dynamic
    clipping scalars see less padding."""
    one_window: bool = False
    """Question answering: leave out questions that need more than one window, for short trials."""
    train_questions: int | None = number(None, 1, _BATCHES)
    """Question answering: maximum number of training questions, spread evenly over the file; null: all."""
    val_questions: int | None = number(None, 1, _BATCHES)
    """Question answering: maximum number of validation questions, spread evenly over the file; null: all."""
    n_best: int = number(20, 1, _TOKENS)
    """Question answering: number of candidates in each window for the start, and for the end, of the answer."""
    max_answer_length: int = number(30, 1, _TOKENS)
    """Question answering: maximum number of tokens in an answer."""


@dataclass
class ClippingSchema(_Strict):
    """How clipping scalars are found."""

    name: str = MISSING
    """Clipping method: `octav`, `max`, `percentile`, `mse_sweep`, `lsq`, `pact`, or one that an installed package
    adds."""
    dynamic: bool = True
    """true: solve for the clipping scalars on each call; false: calibrate them once and keep them (static)."""
    iterations: int | None = number(None, 1, 1000)
    """`octav`: maximum number of reads of a tensor per solution from a cold start; null: 10."""
    warm_iterations: int | None = number(None, 1, 1000)
    """`octav`: maximum number of reads of a tensor per training step, starting from the scalar of the previous step;
    null: a cold start each time."""
    q: float | None = None
    """`percentile`: the q of the q-th percentile of |x|, in percent, above 0 and at most 100; null: 99.99."""
    points: int | None = number(None, 1, 10_000)
    """`mse_sweep`: number of candidates; null: 100."""
    together: bool | None = None
    """`mse_sweep`: let the rows of a weight share one candidate, as in the paper; null: true."""
    missing_code: bool | None = None
    """`octav`: take into account that two's complement has no code at +s, which the paper neglects; null: true in modes
    `ptq` and `allocate`, otherwise false."""
    refine: int | None = number(None, 0, _SAMPLES)
    """`octav`: where few elements share a scalar, number of candidates that are compared by their measured error; null:
    64 in modes `ptq` and `allocate` unless `clipping.sync=true`, otherwise 0."""
    alpha: float | None = number(None, 0, _LARGE, above=True)
    """`pact`: initial clipping scalar of activations; null: 10."""
    start: str | None = None
    """`lsq`: initial step sizes, `lsq` (2 mean |x| / sqrt(Q_P), as published) or `octav`; null: `lsq`."""
    calibration_batches: int | None = number(None, 0, _SAMPLES)
    """Number of training batches for the calibration of static scalars (and of `eval_mode=running` or `last` without
    training); null: 5, or 10 for text, as in the paper."""
    calibration_batch_size: int | None = number(None, 1, _SAMPLES)
    """Samples per calibration batch, and per batch on which `qat-export` makes scalars static; null: 64, or 4 for text,
    which is what one GPU of the paper saw."""
    sync: bool = False
    """With several processes: in training, solve for the scalars of activations on the batch of all processes together
    (dynamic `octav` and `max` only); false: each process uses its own part, as in the paper."""
    eval_mode: str = "dynamic"
    """Clipping scalars of activations in evaluation: `dynamic` (solved on each batch), `running` (their running average
    in training) or `last` (the last ones of training)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of a method that an installed package adds: `clipping.options.NAME=VALUE`."""

    @property
    def kind(self) -> type[ClippingMethod]:
        """The class of the method.

        Raises:
            ConfigError: an installed package registers something that is not a clipping method.
        """
        return METHODS[self.name]

    @property
    def method(self) -> ClippingMethod:
        """The clipping method, with its options.

        Raises:
            ConfigError: an option does not exist or is out of range.
        """
        named = ("iterations", "missing_code", "refine", "q", "points", "together", "alpha", "start")
        options = {name: value for name in named if (value := getattr(self, name)) is not None}
        if self.warm_iterations is not None or hasattr(self.kind, "warm_iterations"):
            options["warm_iterations"] = self.warm_iterations  # null is a value of its own here
        try:
            return clipping_method(self.name, **options, **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"clipping={self.name}: {error}") from error

    @property
    def learned(self) -> bool:
        """Whether clipping scalars are parameters that are learned from gradients."""
        return self.kind.learned


@dataclass
class ClippingConfig(ClippingSchema):
    """The clipping keys of a resolved config, including those that follow from the task."""

    calibration_batches: int = number(MISSING, 0, _SAMPLES)
    calibration_batch_size: int = number(MISSING, 1, _SAMPLES)


@dataclass
class GradientConfig(_Strict):
    """How gradients pass through quantization."""

    name: str = MISSING
    """Gradient estimator: `ste`, `pwl`, `mad`, `ewgs`, `trust`, `mph`, or one that an installed package adds."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the estimator, if it has any: `gradient.options.NAME=VALUE`."""

    @property
    def estimator(self) -> str | Estimator:
        """The name of the estimator or, if options are given, the estimator with these options.

        Raises:
            ConfigError: an option does not exist or is out of range.
        """
        try:
            return estimator_of(self.name, **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"gradient={self.name}: {error}") from error


@dataclass
class StageConfig(_Strict):
    """How one stage (from scratch, retraining or fine-tuning) is trained."""

    epochs: int = number(MISSING, 1, _EPOCHS)
    """Number of passes over the training data."""
    batch_size: int = number(MISSING, 1, _SAMPLES)
    """Samples per step, summed over all devices."""
    lr: float = number(MISSING, 0, _LARGE, above=True)
    """Learning rate at that batch size, before any decay."""
    optimizer: Optimizer = Optimizer.sgd
    """Optimizer: `sgd` or `adamw`."""
    bias_correction: bool = True
    """`adamw`: correct the running averages, which start at zero, for their bias in the first steps."""
    momentum: float = number(0.9, 0, 1, below=True)
    """`sgd`: momentum."""
    weight_decay: float = number(1e-4, 0, _LARGE)
    """Weight decay; `sgd` adds it to the gradients, `adamw` applies it separately."""
    spared: Spared = Spared.vectors
    """`adamw`: parameters without weight decay. `vectors`: parameters of one dimension, i.e. biases and normalization.
    `tokens`: also tokens and position embeddings, as in DeiT, tables of relative positions, and layer scales."""
    nesterov: bool = False
    """`sgd`: use Nesterov momentum."""
    max_grad_norm: float | None = number(None, 0, _LARGE, above=True)
    """Gradients are scaled down to this norm, computed over all parameters; null: no clipping of gradients."""
    label_smoothing: float = number(0.0, 0, 1, below=True)
    """Label smoothing, from 0 to below 1."""
    schedule: Schedule = Schedule.step
    """Schedule of the learning rate. `step`: multiply by `decay_factor` every `decay_every` epochs; `cosine`, `linear`:
    decay to zero over the epochs."""
    decay_every: int = number(30, 1, _EPOCHS)
    """`schedule=step`: number of epochs between two decays."""
    decay_factor: float = number(0.1, 0, 1, above=True)
    """`schedule=step`: factor of each decay, above 0 and at most 1."""
    warmup_epochs: float = number(0.0, 0, _EPOCHS)
    """Length of the linear warm-up at the start, in epochs; may be a fraction."""
    mixup: float = number(0.0, 0, 1000)
    """Images: alpha of the Beta distribution from which mixup draws how pairs of training images are blended; 0: no
    mixup."""
    cutmix: float = number(0.0, 0, 1000)
    """Images: alpha of the Beta distribution from which CutMix draws the rectangle of one training image that is pasted
    into another; 0: no CutMix. With both `mixup` and `cutmix`, each batch gets one of them at random."""
    random_erasing: float = number(0.0, 0, 1)
    """Images: share of the training images in which a random rectangle is replaced by the mean."""
    ema_decay: float = number(0.0, 0, 1, below=True)
    """Decay per step of the exponential moving average of weights, BatchNorm statistics and clipping scalars. The
    average is what is validated, and is saved as best.pt and as the model in last.pt; 0: no average."""
    drop_path: float | None = number(None, 0, 1, below=True)
    """Stochastic depth, for networks of other libraries that support it: probability that the last residual branch is
    skipped in training; it rises to this value from block to block; null: the library's default."""


@dataclass
class RecipeConfig(_Strict):
    """The full-precision recipe of a network on a data set, with one stage per mode that trains. Quantized runs use it
    unmodified."""

    name: str = MISSING
    """Name of the recipe in messages."""
    device_batch: int | None = number(None, 1, _SAMPLES)
    """Samples that one device processed at a time in the published recipe, i.e. over which BatchNorm statistics and
    clipping scalars of activations were computed. For information only: the log compares the run with it; null: not
    published."""
    scratch: StageConfig | None = None
    retrain: StageConfig | None = None
    long_retrain: StageConfig | None = None
    finetune: StageConfig | None = None
    distill: Distill = Distill.none
    """Distillation. `full_precision`: learn also from the logits of the full-precision network in `recipe.teacher`;
    `none`: learn from the labels alone."""
    teacher: str | None = path(None)
    """Weights of the teacher: a file as in `weights`, or `pretrained`; null: the value of `weights`."""
    teacher_model: str | None = None
    """Network of the teacher, by a name as in `model`; null: the network that is trained."""
    teacher_part: str | None = None
    """Part of the teacher's file, as in `weights_part`."""
    distill_temperature: float = number(4.0, 0, 1e6, above=True)
    """Temperature by which the logits of both networks are divided, above 0."""
    distill_weight: float = number(0.5, 0, 1, above=True)
    """Weight of the teacher in the loss, above 0 and at most 1; the labels have the remaining weight."""
    freeze_scalars_at: float | None = number(None, 0, _EPOCHS, above=True)
    """Epoch, may be a fraction, from which the clipping scalars of activations are static, at their running average, so
    that training adapts to the scalars of static inference; null: never."""
    batchnorm_batches: int = number(0, 0, _SAMPLES)
    """Number of training batches on which the mean and variance of every BatchNorm are re-estimated after the last
    epoch, in the network that is validated, before its last validation; 0: keep the moving averages of training."""

    def stages(self) -> list[tuple[str, StageConfig]]:
        """The names and settings of the stages that the recipe has."""
        return [(name, stage) for name in STAGES if (stage := getattr(self, name)) is not None]


@dataclass
class AllocationConfig(_Strict):
    """How the bit-width of each tensor is chosen with `mode=allocate` or `bits=auto`."""

    price: str = "gradient"
    """Price (estimated sensitivity) of a tensor at a bit-width: `gradient` (squared gradients of the loss times squared
    errors), `measured` (the rise of the loss with this tensor alone quantized; slow) or `noise` (errors alone)."""
    widths: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8], metadata=within(2, 16))
    """Bit-widths to choose from."""
    same: bool = False
    """Give both operands of a layer or matrix multiplication the same bit-width."""
    batches: int = number(16, 1, _SAMPLES)
    """Number of training batches on which prices are computed."""
    batch_size: int = number(32, 1, _SAMPLES)
    """Samples per batch on which prices are computed."""
    cost: str = "mean_bits"
    """Cost that the Pareto front is computed for and that `max_drop` minimizes: `mean_bits`, `size_mb`, `bitops`,
    `traffic_mb` or `latency_ms`."""
    latencies: str | None = path(None)
    """JSON file of measured latencies: layer -> bit-widths of its operands, such as "4x8" for weight and input ->
    milliseconds."""


@dataclass
class OscillationsConfig(_Strict):
    """Weights that flip between two codes in training, and the remedies (Nagel et al. 2022)."""

    measure: bool = False
    """Record for each weight, after each epoch, which share of its elements oscillates; takes 9 bytes per element."""
    momentum: float = number(0.01, 0, 1, above=True)
    """Weight of one step in the moving averages of flips and of codes."""
    threshold: float = number(0.005, 0, 1, below=True)
    """Flips per step above which an element counts as oscillating."""
    max_bits: int = number(4, 2, 16)
    """Largest bit-width of weights that are tracked and frozen; at more bits, one code makes little difference."""
    freeze_to: float | None = number(None, 0, 1, below=True)
    """Flips per step, at the end of training, above which an element is frozen at its mean code; null: no element is
    frozen."""
    freeze_from: float = number(0.1, 0, 1)
    """The same threshold at the start of training; it falls to `freeze_to` along half a cosine."""
    dampening: float = number(0.0, 0, _LARGE)
    """Weight in the loss, at the end of training, of the squared distance between weights and their quantized values;
    it rises from 0 along half a cosine."""

    @property
    def watching(self) -> bool:
        """Whether codes are tracked from step to step."""
        return self.measure or self.freeze_to is not None


@dataclass
class ConfigSchema(_Strict):
    """A config as Hydra composes it. Keys that follow from others may be null."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    clipping: ClippingSchema = field(default_factory=ClippingSchema)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    oscillations: OscillationsConfig = field(default_factory=OscillationsConfig)

    mode: Mode = Mode.auto
    """What the run does. `scratch`: train from random weights; `finetune`: train from `model.checkpoint`; `retrain`,
    `long_retrain`: train from `weights`; `ptq`: quantize `weights` without training; `allocate`: choose a bit
    allocation for `weights`, as `qat-bits` does; `evaluate`: validate the network in `weights` as it was saved; `auto`:
    `finetune` for text if the recipe has this stage, otherwise `scratch`."""
    weights: str | None = path(None)
    """Weights to start from: a .pt, .pth, .th, .ckpt, .bin, .tar or .safetensors file, or the folder or .index.json of
    sharded files. `pretrained`: the weights that the model's own library publishes; `torchvision`: the first weights
    that torchvision published, which the paper uses; `baseline`: the full-precision run of the same network, data,
    recipe and seed in mode `auto`, which is run first if it is missing."""
    weights_part: str | None = None
    """For a file that holds several networks: the key of one of them, such as state_dict_ema, or the prefix of its
    tensor names; null: the network that fits the model, with raw weights preferred over averaged ones."""

    bits: int = 4
    """Bit-width of weights and activations, 2 to 16; 32 is the full-precision baseline. `auto` is short for
    `policy=auto`."""
    weight_bits: int | None = None
    """Bit-width of weights; null: `bits`."""
    activation_bits: int | None = None
    """Bit-width of activations; null: `bits`."""
    first_last_bits: int | None = None
    """Bit-width of the first convolution and the last linear layer, weights and inputs; null: 8, or no exception for
    text."""
    quantize_head: bool | None = None
    """Quantize the last linear layer (a classifier at `first_last_bits`); null: true, or false for text."""
    conv_granularity: str = "channel"
    """Clipping scalars of a convolution weight: `channel` (one per output channel) or `tensor` (one in all)."""
    linear_granularity: str = "auto"
    """Clipping scalars of a linear weight: `channel` (one per output feature) or `tensor` (one in all); `auto`:
    `channel` for text, otherwise `tensor`."""
    activation_granularity: str = "tensor"
    """Clipping scalars of an activation: `tensor` (one in all), or `token` (one for each token of the input of a linear
    layer or an expert and of the query, key and probabilities of attention, always dynamic; other activations still
    have one per tensor)."""
    format: str = "int"
    """Number format: `int`; `int_affine`, which has a zero point, and a lower and an upper clipping bound instead of
    one clipping scalar; or one that an installed package adds."""
    weight_format: str | None = None
    """Number format of weights; null: `format`."""
    activation_format: str | None = None
    """Number format of activations; null: `format`."""
    range: str = "twos_complement"
    """Codes of the format `int`, where s is the clipping scalar: `twos_complement` (no code at +s), `full` (a code at
    both ends) or `oriented` (two's complement with a signed step size, so that the code at the end is on the side that
    needs it)."""
    weight_range: str | None = None
    """Codes of weights, as in `range`; null: `range`."""
    activation_range: str | None = None
    """Codes of activations, as in `range`; for activations that are never negative, `full` and `oriented` both have a
    code at s; null: `range`."""
    rules: list[Any] = field(default_factory=list)
    """Exceptions for layers or tensors, such as `[{match: layer4.*, bits: 3}, {match: "*.weight", ...}]`; later rules
    override earlier ones; see the page about policies."""
    policy: str | None = path(None)
    """Mixed-precision policy: a YAML file of rules, which come before those of `rules`; or `auto` (`bits=auto` for
    short), the rules that `qat-bits` finds under the same limits, which is run first; null: no policy."""
    budget: float | None = number(None, 2, 16)
    """Bit allocation: maximum average bit-width, of weights and of activations each, over the elements of all tensors
    whose bit-width neither a rule nor `first_last_bits` sets; null: no limit."""
    size_mb: float | None = number(None, 0, _LARGE, above=True)
    """Bit allocation: maximum size of the stored network in megabytes (10^6 bytes); null: no limit."""
    bitops: float | None = number(None, 0, _LARGE, above=True)
    """Bit allocation: maximum number of bit operations for one sample, in units of 10^9; they are the
    multiply-accumulates times the bit-widths of both factors; null: no limit."""
    traffic_mb: float | None = number(None, 0, _LARGE, above=True)
    """Bit allocation: maximum size, in megabytes, of the operands that are read for one sample; null: no limit."""
    latency_ms: float | None = number(None, 0, _LARGE, above=True)
    """Bit allocation: maximum latency for one sample in milliseconds, according to `allocation.latencies`; null: no
    limit."""
    max_drop: float | None = number(None, 0, _LARGE)
    """Bit allocation: find the cheapest allocation whose metric is at most this much worse than in full precision;
    null: allocate by the limits above."""
    retrain_steps: int = number(0, 0, _BATCHES)
    """Bit allocation: number of training steps, with the recipe's stage `retrain`, before a candidate network is
    measured."""

    epochs: int | None = number(None, 1, _EPOCHS)
    """Number of passes over the training data; null: the recipe's."""
    batch_size: int | None = number(None, 1, _SAMPLES)
    """Samples per step, summed over all devices; null: the recipe's."""
    lr: float | None = number(None, 0, _LARGE, above=True)
    """Learning rate before any decay; null: the recipe's. If `batch_size` differs from the recipe's, that value is
    scaled in proportion to the batch size or, for AdamW, to its square root."""
    accumulate: int = number(1, 1, _SAMPLES)
    """Number of parts in which each batch is computed, with gradients accumulated over them; saves memory at the same
    batch size."""
    seed: int = number(0, 0, 2**32 - 1)
    """Seed of the initialization, data order and augmentation, 0 to 2^32 - 1."""
    backend: str = "auto"
    """Backend of the quantization kernels: `auto`, `eager` (plain PyTorch), `compiled` (C++, CPU) or `triton`
    (CUDA)."""
    device: str = "auto"
    """Device: `auto`, `cpu`, `cuda` or `cuda:N`."""
    amp: Amp = Amp.none
    """Autocast of convolutions and matrix multiplications: `none`, `bf16` or `fp16`. With `none`, PyTorch computes
    convolutions on GPUs in TF32, which rounds the factors to eleven significant bits."""
    channels_last: bool = True
    """Use the channels-last memory layout for weights and images, which is faster on CPUs and GPUs."""
    cudnn_benchmark: bool = False
    """On a GPU, time the algorithms of each convolution when it first meets a shape, and use the fastest. The choice
    may differ each time the command is started, and with it the last bits of all results. A run with this key therefore
    counts as a different run and is not reproducible to the bit."""
    compile: bool = False
    """Run training steps on the network compiled to a single graph by torch.compile: faster after minutes of startup,
    and with different last bits."""
    limit_train_batches: int | None = number(None, 1, _BATCHES)
    """Maximum number of training batches per epoch; null: all."""
    limit_val_batches: int | None = number(None, 1, _BATCHES)
    """Maximum number of validation batches; null: all."""
    noise_batches: int = number(1, 0, _BATCHES)
    """Number of validation batches on which quantization noise is measured after each epoch; 0: never."""

    sync_batchnorm: bool = False
    """With several processes: compute BatchNorm statistics over the batch of all processes together."""
    distributed_timeout: float = number(600.0, 0, 1e6, above=True)
    """With several processes: seconds after which a process that waits for another one gives up."""
    checkpoint_minutes: float = number(10.0, 0, 1e6, above=True)
    """Minutes between two checkpoints; another one is written at the end of each epoch."""

    sweep: dict[str, str] = field(default_factory=dict)
    """Set by an experiment: the keys and values that `-m` sweeps over, unless the command line sets the key."""
    standins: dict[str, str] = field(default_factory=dict)
    """Set by a stand_in: replacements for values in `sweep`."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema; set by the runner."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the files and folders in this config when the run read them; set by the runner."""

    allocated: list[Any] = field(default_factory=list)
    """For `bits=auto`: the rules that were found; set by the runner."""

    given: list[str] = field(default_factory=list)
    """Preprocessing keys that the command sets, which the model's own values do not override; set by the runner."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers that show the metrics in addition to the run's own files: `tensorboard`, `wandb`, `mlflow`,
    or one that an installed package adds; `none`: no tracker."""

    log_excess_mse: bool = False
    """Add to steps.csv by how much the MSE of warm-started scalars exceeds that of converged ones (slow)."""

    data_dir: str = path("data")
    """Folder of the data sets; default: the environment variable QAT_DATA_DIR, otherwise ./data."""
    runs_dir: str = path("runs")
    """Folder in which run folders are created."""
    run_dir: str | None = path(None)
    """Folder of this run; null: a folder in `runs_dir` named after the config."""
    overwrite: bool = False
    """true: start from scratch if the run folder exists; false: show a finished run and resume an unfinished one."""
    resume: Resume = Resume.auto
    """What to do with an unfinished run. `auto`: resume it if it has the same config; `force`: resume it even if the
    config differs; `never`: stop with an error."""

    @property
    def training(self) -> bool:
        """Whether the mode trains a network."""
        return self.mode in STAGES

    @property
    def allocating(self) -> bool:
        """Whether bit-widths are chosen, by this run or by one that precedes it."""
        return self.mode == Mode.allocate or self.policy == AUTO

    @property
    def limits(self) -> dict[str, float]:
        """The limits on the total cost of a bit allocation, by key."""
        return {key: most for key in LIMITS if (most := getattr(self, key)) is not None}

    @property
    def asked_bits(self) -> str:
        """The limits, or the allowed drop, under which bit-widths are chosen, as in "budget=4"."""
        asked = self.limits or {"max_drop": self.max_drop or 0.0}
        return ", ".join(f"{key}={most:g}" for key, most in asked.items())

    @property
    def preprocessed(self) -> bool:
        """Whether images are preprocessed as the model's library states."""
        wanted = self.dataset.preprocessing
        follows = wanted == Preprocessing.model or (wanted == Preprocessing.auto and self.weights == PRETRAINED)
        return follows and "dataset.mean" not in foreign_keys(self.task)

    @property
    def task(self) -> TaskFacts:
        """The facts about the data set's task.

        Raises:
            ConfigError: the task does not exist.
        """
        if self.dataset.task not in FACTS:
            raise ConfigError(f"dataset.task={self.dataset.task}: {one_of(self.dataset.task, FACTS)}")
        return FACTS[self.dataset.task]

    @property
    def stage(self) -> StageConfig:
        """The recipe's stage that this mode uses. A mode that does not train takes its batch size from the stage of
        mode auto.

        Raises:
            ConfigError: the recipe does not have the stage.
        """
        mode = self.mode if self.training else self.auto_mode
        stage: StageConfig | None = getattr(self.recipe, mode)
        if stage is None:
            has = ", ".join(name for name, _ in self.recipe.stages())
            raise ConfigError(f"mode={mode}: recipe={self.recipe.name} has no such stage; its stages are {has}")
        return stage

    @property
    def auto_mode(self) -> Mode:
        """The mode that mode=auto selects: the first mode of the task that needs no `weights` and that the recipe
        has."""
        starts = [Mode(mode) for mode in self.task.modes if mode in (Mode.scratch, Mode.finetune)]
        return next((mode for mode in starts if getattr(self.recipe, mode) is not None), Mode(self.task.modes[0]))


@dataclass
class Config(ConfigSchema):
    """A resolved config: keys that follow from others are filled in (see `resolving`), so null means "none"."""

    clipping: ClippingConfig = field(default_factory=ClippingConfig)
    weight_bits: int = MISSING
    activation_bits: int = MISSING
    weight_format: str = MISSING
    activation_format: str = MISSING
    weight_range: str = MISSING
    activation_range: str = MISSING
    epochs: int = number(MISSING, 1, _EPOCHS)
    batch_size: int = number(MISSING, 1, _SAMPLES)
    lr: float = number(MISSING, 0, _LARGE, above=True)

    @property
    def retraining(self) -> bool:
        """Whether the mode trains a network further from `weights`."""
        return self.mode in (Mode.retrain, Mode.long_retrain)

    @property
    def clipping_in_mode(self) -> ClippingConfig:
        """`clipping` with nulls replaced by their meaning in this mode: without training, OCTAV accounts for what the
        paper neglects. `clipping` itself keeps the requested values, because a config derived from this one may have
        another mode, such as the retrained probes of qat-bits."""
        missing = {key: value for key, value in self.clipping_of_mode.items() if getattr(self.clipping, key) is None}
        return replace(self.clipping, **missing)

    @property
    def clipping_of_mode(self) -> dict[str, Any]:
        """The options of `clipping` that have a default of their own in this mode, with these defaults."""
        if self.mode in (Mode.ptq, Mode.allocate) and self.clipping.name == Octav.name:
            return {"missing_code": True, "refine": 0 if self.clipping.sync else 64}
        return {}

    @property
    def bits_label(self) -> int | str:
        """The bit-widths of weights and activations: one number if both are equal, otherwise "4/8"; or, if bit-widths
        are chosen, the limits of the choice."""
        if self.allocating:
            return self.asked_bits
        both = self.weight_bits, self.activation_bits
        return both[0] if both[0] == both[1] else f"{both[0]}/{both[1]}"

    @property
    def distilling(self) -> bool:
        """Whether the network is trained with a teacher."""
        return self.training and self.recipe.distill != Distill.none

    @property
    def freezing(self) -> bool:
        """Whether the clipping scalars of activations become static in the last part of training."""
        return self.quantized_training and self.recipe.freeze_scalars_at is not None

    @property
    def quantized_training(self) -> bool:
        """Whether a network is trained with quantizers."""
        return self.training and not self.quantization.full_precision

    @property
    def reestimating(self) -> bool:
        """Whether BatchNorm statistics are re-estimated after training."""
        return self.training and self.recipe.batchnorm_batches > 0

    @property
    def remedies(self) -> list[str]:
        """The remedies applied in addition to quantization and training, one word each."""
        how, quantized = self.oscillations, self.quantized_training
        frozen, dampened = quantized and how.freeze_to is not None, quantized and how.dampening > 0
        words = {"frozen": frozen, "dampened": dampened, "batchnorm": self.reestimating}
        return [word for word, done in words.items() if done]

    @property
    def all_learned(self) -> bool:
        """Whether all clipping scalars are learned from gradients, i.e. no rule sets a method that solves for them."""
        others = (rule.clipping for rule in self.quantization.rules if rule.clipping is not None)
        return self.clipping.learned and all(method.learned for method in others)

    @property
    def all_static(self) -> bool:
        """Whether all clipping scalars are calibrated before training, or without it, and there are no rules."""
        return not (self.clipping.dynamic or self.clipping.learned or self.rules)

    @property
    def remedy_labels(self) -> list[str]:
        """`remedies`, preceded by MIXED if there are rules, as in summary.json."""
        return [*([MIXED] if self.rules else []), *self.remedies]

    @property
    def of_teacher(self) -> "Config":
        """This config with the network of the teacher, which is not trained."""
        name = self.recipe.teacher_model
        model = self.model if name is None else ModelConfig(name=name, stem=self.model.stem)
        return replace(self, model=model, mode=Mode.evaluate)

    def content(self, path: str) -> str:
        """The fingerprint of a path, as recorded by the run or else as it is now. A value that is not a path is
        returned unchanged."""
        return path if path in WORDS_OF_WEIGHTS else self.fingerprints.get(path) or fingerprint(path)

    def with_fingerprints(self) -> "Config":
        """This config with the `fingerprints` of all files that it refers to, as saved in a run's config.yaml, so that
        the files may be moved later."""
        named = {self.weights, self.recipe.teacher, self.model.checkpoint, checkpoint_of(self.model.name)}
        named |= {self.allocation.latencies}
        paths = sorted(path for path in named if path is not None and path not in WORDS_OF_WEIGHTS)
        return replace(self, fingerprints={path: self.content(path) for path in paths})

    @cached_property
    def quantization(self) -> Policy:
        """The quantization policy of all tensors; cached, since a config is never changed but replaced.

        Raises:
            ConfigError: the keys do not form a valid policy.
        """
        method, estimator = self.clipping_in_mode.method, self.gradient.estimator
        try:
            return Policy.of(
                self.bits,
                method,
                estimator,
                weight_format=self.weight_format,
                activation_format=self.activation_format,
                weight_range=self.weight_range,
                activation_range=self.activation_range,
                weight_bits=self.weight_bits,
                activation_bits=self.activation_bits,
                first_last_bits=self.first_last_bits,
                # Beside learned scalars, a tensor whose rule sets another method is dynamic unless the rule disagrees.
                dynamic=self.clipping.dynamic or self.clipping.learned,
                eval_mode=self.clipping.eval_mode,
                conv_granularity=self.conv_granularity,
                linear_granularity=self.linear_granularity,
                activation_granularity=self.activation_granularity,
                quantize_head=self.task.quantize_head if self.quantize_head is None else self.quantize_head,
                synchronize=self.clipping.sync,
                rules=[Rule.from_dict(rule) for rule in (*self.rules, *self.allocated)],
            )
        except ValueError as error:
            raise ConfigError(f"{'rules' if str(error).startswith('rule ') else 'policy'}: {error}") from error

    @property
    def needs_calibration(self) -> bool:
        """Whether clipping scalars must be calibrated on training batches before the first use."""
        return self.mode not in (Mode.allocate, Mode.evaluate) and self._needs_calibration_in(self.mode)

    @property
    def calibrates_probes(self) -> bool:
        """Whether the networks that are measured during bit allocation need calibration."""
        return self.allocating and self._needs_calibration_in(Mode.retrain if self.retrains_probes else Mode.ptq)

    @property
    def retrains_probes(self) -> bool:
        """Whether networks are retrained during bit allocation, so that the training settings affect the result."""
        return self.allocating and self.retrain_steps > 0

    def _needs_calibration_in(self, mode: Mode) -> bool:
        policy = self.quantization
        wanted = policy.needs_calibration or (self.clipping.eval_mode != "dynamic" and mode == Mode.ptq)
        return wanted and not policy.full_precision
