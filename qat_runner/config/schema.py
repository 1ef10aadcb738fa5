"""The schema of configs/: every key of a run, typed, with range, unit and meaning.

`ConfigSchema` is what Hydra composes; in it may be null what follows from the rest. `Config` is the resolved one, which
all the other rooms get.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from qat_runner.config.fingerprints import fingerprint
from qat_runner.config.keys import number, path, within
from qat_runner.config.tasks import FACTS, TaskFacts, foreign_keys
from qat_runner.config.versions import SCHEMA_VERSION
from qat_runner.config.words import checkpoint_of
from qat_runner.errors import ConfigError
from qat_runner.policy import Policy, Rule, estimator_of
from qat_runner.quant import METHODS, ClippingMethod, Estimator, Octav, clipping_method


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
    sgd = "sgd"
    adamw = "adamw"


class Spared(StrEnum):
    """What AdamW does not decay."""

    vectors = "vectors"
    tokens = "tokens"


class Schedule(StrEnum):
    """How the learning rate falls."""

    step = "step"
    cosine = "cosine"
    linear = "linear"


class Padding(StrEnum):
    """Of token windows."""

    max_length = "max_length"
    longest = "longest"


class Resizing(StrEnum):
    """What resizes pictures of folders."""

    pillow = "pillow"
    tensor = "tensor"


class Decode(StrEnum):
    """Where pictures of folders are decoded."""

    cpu = "cpu"
    gpu = "gpu"


class Interpolation(StrEnum):
    """Between pixels, where pictures are resized."""

    nearest = "nearest"
    bilinear = "bilinear"
    bicubic = "bicubic"


class Preprocessing(StrEnum):
    """Whose size and normalization pictures have."""

    auto = "auto"
    dataset = "dataset"
    model = "model"


class Distill(StrEnum):
    """Whom a network learns from, beside the labels."""

    none = "none"
    full_precision = "full_precision"


class Amp(StrEnum):
    """What convolutions and matrix products are cast to."""

    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    """What becomes of an unfinished run."""

    auto = "auto"
    force = "force"
    never = "never"


STAGES = (Mode.scratch, Mode.retrain, Mode.long_retrain, Mode.finetune)
"""The modes that train, each a stage of the recipe."""
OF_STAGE = ("epochs", "batch_size", "lr")
"""The keys that follow from the recipe's stage unless they are given."""

TORCHVISION = "torchvision"
"""The value of `weights` that means torchvision's published weights."""
PRETRAINED = "pretrained"
"""The value of `weights` that means the published weights of the model, by its own library."""
BASELINE = "baseline"
"""The value of `weights` that stands for the run that `baseline_of` names."""
WORDS_OF_WEIGHTS = (TORCHVISION, PRETRAINED, BASELINE)
"""Values of `weights` that are no paths, whatever lies there."""
AUTO = "auto"
"""The value of `policy` that stands for what the run that `allocation_of` names comes to."""
LIMITS = ("budget", "size_mb", "bitops", "traffic_mb", "latency_ms")
"""The keys that limit what bits may cost in all."""


_EPOCHS = 100_000
_SAMPLES = 1_000_000
_BATCHES = 1_000_000_000
_TOKENS = 100_000
_LARGE = 1e30  # float32 goes to 3e38


@dataclass
class ModelConfig:
    name: str = MISSING
    """a name in qat_runner.models.MODELS, BERTS or DECODERS, or torchvision/NAME, timm/NAME, hf/FOLDER, hf/NAME; see
    the page about models"""
    stem: str = "auto"
    """auto (by picture size), imagenet (as published) or small (first strides 1, no max pooling)"""
    width: float = number(1.0, 0, 4, above=True)
    """channels of a MobileNet, as a multiple of the published ones; without effect on ResNets"""
    stride_in: str = "3x3"
    """ResNets with bottlenecks: the convolution that has the stride, 3x3 (the second, as torchvision's) or 1x1 (the
    first, as published, and in weights from Caffe and Keras). Weights load into either, and are good in one alone"""
    bn_eps: float | None = number(None, 0, 1, above=True)
    """what every BatchNorm adds to variances, for weights that were trained with another: 1.001e-5 in Keras' ResNets,
    1e-3 in many networks of TensorFlow; null: as the network has it, mostly 1e-5"""
    checkpoint: str | None = path(None)
    """networks of texts: a folder as transformers writes it, or a name on the Hugging Face hub; of a decoder in mode
    scratch its configuration and tokenizer are enough"""


@dataclass
class DatasetConfig:
    name: str = MISSING
    """a name in qat_runner.data.DATASETS"""
    task: str = "classification"
    """what is learned of it: classification, question_answering or language_modelling; it follows from the name"""
    num_classes: int | None = number(None, 2, 100_000)
    """pictures: classes; null: as many as the folder has"""
    image_size: int = number(0, 1, 8192)
    """pictures: pixels a side of what the network sees"""
    mean: list[float] = field(default_factory=list, metadata=within(-1e6, 1e6))
    """pictures: normalization, a number a channel, of values in 0..1"""
    std: list[float] = field(default_factory=list, metadata=within(0, 1e6, above=True))
    """pictures: normalization, a number a channel, of values in 0..1"""
    augment: str = "none"
    """of training pictures held in memory: none, crop or crop_flip; folders of pictures get ImageNet's"""
    val_batch_size: int = number(500, 1, _SAMPLES)
    """samples a validation batch; dynamic activation scalars are solved on each, so it is part of the result"""
    workers: int = number(4, 0, 1024)
    """decoding processes (folders of pictures only)"""
    skip_corrupt: bool = False
    """folders of pictures: leave out those that cannot be decoded, and count them, instead of stopping"""
    resizing: Resizing = Resizing.pillow
    """folders of pictures: by pillow, as the published recipes do, or as a tensor: faster, a byte may differ by 1"""
    decode: Decode = Decode.cpu
    """folders of pictures: JPEGs by the workers, or on the gpu that trains, where all are then resized as well, with
    resizing=tensor; its decoder rounds otherwise, so it is another run"""
    interpolation: Interpolation = Interpolation.bilinear
    """where pictures are resized: nearest, bilinear or bicubic"""
    resize_size: int | None = number(None, 1, 16384)
    """folders of pictures: pixels of the shorter side of a validation picture before its centre is cut out; null:
    256/224 of image_size"""
    preprocessing: Preprocessing = Preprocessing.auto
    """pictures: whose image_size, mean, std, interpolation and resize_size hold. dataset: the keys'; model: what the
    model's library says that its weights were validated on, but for keys that the command gives, and pictures held in
    memory are enlarged; auto: model for weights=pretrained, else dataset"""
    fake_pictures: int = number(512, 2, 100_000)
    """training pictures of dataset=fake"""
    max_length: int = number(384, 8, _TOKENS)
    """text: tokens a window, question, part of the paragraph and special tokens together; of plain text, a block"""
    stride: int = number(128, 1, _TOKENS)
    """questions: tokens of the paragraph from the start of a window to that of the next"""
    padding: Padding = Padding.max_length
    """questions: pad a batch to max_length, or to its longest window: faster, but dynamic scalars see less padding"""
    one_window: bool = False
    """questions: leave out those that take more than one window, for short trials"""
    train_questions: int | None = number(None, 1, _BATCHES)
    """questions: at most so many for training, spread evenly over the file; null: all"""
    val_questions: int | None = number(None, 1, _BATCHES)
    """questions: at most so many for validation, spread evenly over the file; null: all"""
    n_best: int = number(20, 1, _TOKENS)
    """questions: starts and ends of a window that may become the answer"""
    max_answer_length: int = number(30, 1, _TOKENS)
    """questions: tokens of an answer"""


@dataclass
class ClippingSchema:
    name: str = MISSING
    """octav, max, percentile, mse_sweep, lsq or pact, or what an installed package adds"""
    dynamic: bool = True
    """solve scalars on each call; otherwise static: calibrated once"""
    iterations: int | None = number(None, 1, 1000)
    """octav: reads of a tensor a solution, from cold"""
    warm_iterations: int | None = number(None, 1, 1000)
    """octav: at most so many reads a training step, from the previous step's scalar; null: from cold each time"""
    q: float | None = None
    """percentile: q of the q-th percentile of |x|, in percent"""
    points: int | None = number(None, 1, 10_000)
    """mse_sweep: candidates"""
    together: bool | None = None
    """mse_sweep: rows of a weight share one candidate, as in the paper"""
    missing_code: bool | None = None
    """octav: know that two's complement has no code at +s, which the paper neglects; null: in modes ptq and allocate"""
    refine: int | None = number(None, 0, _SAMPLES)
    """octav: candidates whose measured error decides, where few share a scalar; null: 64 in ptq and allocate, else 0"""
    alpha: float | None = number(None, 0, _LARGE, above=True)
    """pact: the first clipping scalar of activations"""
    start: str | None = None
    """lsq: where step sizes begin, lsq (2 mean |x| / sqrt(Q_P), as published) or octav; null: lsq"""
    calibration_batches: int | None = number(None, 0, _SAMPLES)
    """training batches that static scalars (and eval_mode running or last without training) are calibrated on; null:
    5, on texts 10, as in the paper"""
    calibration_batch_size: int | None = number(None, 1, _SAMPLES)
    """samples a calibration batch, and of those that qat-export makes scalars static on; null: 64, on texts 4, what
    one GPU of the paper saw"""
    sync: bool = False
    """of several processes: solve activation scalars in training on the batch of all together (dynamic octav and max);
    otherwise each on its own part, as in the paper"""
    eval_mode: str = "dynamic"
    """activation scalars in evaluation: dynamic (solved on each batch), running (their average in
    training) or last (the last of training)"""
    options: dict[str, Any] = field(default_factory=dict)
    """further options of a method that an installed package adds: clipping.options.NAME=VALUE"""

    @property
    def kind(self) -> type[ClippingMethod]:
        """The class of the method.

        Raises:
            ConfigError: an installed package names what is none.
        """
        return METHODS[self.name]

    @property
    def method(self) -> ClippingMethod:
        """The clipping method, with its options.

        Raises:
            ConfigError: an option that it does not have, or out of range.
        """
        named = ("iterations", "missing_code", "refine", "q", "points", "together", "alpha", "start")
        options = {name: value for name in named if (value := getattr(self, name)) is not None}
        if self.warm_iterations is not None or hasattr(self.kind, "warm_iterations"):
            options["warm_iterations"] = self.warm_iterations  # of which null is a value
        try:
            return clipping_method(self.name, **options, **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"clipping={self.name}: {error}") from error

    @property
    def learned(self) -> bool:
        """Whether scalars are parameters, with gradients of their own."""
        return self.kind.learned


@dataclass
class ClippingConfig(ClippingSchema):
    """With what follows from the task."""

    calibration_batches: int = number(MISSING, 0, _SAMPLES)
    calibration_batch_size: int = number(MISSING, 1, _SAMPLES)


@dataclass
class GradientConfig:
    name: str = MISSING
    """ste, pwl, mad, ewgs, trust or mph, or what an installed package adds"""
    options: dict[str, Any] = field(default_factory=dict)
    """of an estimator that has some: gradient.options.NAME=VALUE"""

    @property
    def estimator(self) -> str | Estimator:
        """Its name; with options the estimator that they make.

        Raises:
            ConfigError: an option that it does not have, or out of range.
        """
        try:
            return estimator_of(self.name, **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"gradient={self.name}: {error}") from error


@dataclass
class StageConfig:
    """How one stage, from scratch or retraining or fine-tuning, is trained."""

    epochs: int = number(MISSING, 1, _EPOCHS)
    """times that the training data are gone through"""
    batch_size: int = number(MISSING, 1, _SAMPLES)
    """samples a step, over all devices"""
    lr: float = number(MISSING, 0, _LARGE, above=True)
    """learning rate at that batch size, before any decay"""
    optimizer: Optimizer = Optimizer.sgd
    """sgd or adamw"""
    bias_correction: bool = True
    """adamw: divide the running averages, which start at zero, by what they lack in the first steps"""
    momentum: float = number(0.9, 0, 1, below=True)
    """sgd"""
    weight_decay: float = number(1e-4, 0, _LARGE)
    """of SGD added to the gradients, of AdamW apart from them"""
    spared: Spared = Spared.vectors
    """adamw: what does not decay. vectors: parameters of one dimension, which are biases and normalization; tokens:
    beside them tokens and embeddings of positions, as in DeiT, tables of relative positions, and scales of layers"""
    nesterov: bool = False
    """sgd"""
    max_grad_norm: float | None = number(None, 0, _LARGE, above=True)
    """gradients are scaled down to this norm, over all parameters; null: never"""
    label_smoothing: float = number(0.0, 0, 1, below=True)
    """0 to below 1"""
    schedule: Schedule = Schedule.step
    """step: times decay_factor every decay_every epochs; cosine, linear: to zero over the epochs"""
    decay_every: int = number(30, 1, _EPOCHS)
    """epochs"""
    decay_factor: float = number(0.1, 0, 1, above=True)
    """above 0, at most 1"""
    warmup_epochs: float = number(0.0, 0, _EPOCHS)
    """epochs, or a part of one, of linear rise at the start"""
    mixup: float = number(0.0, 0, 1000)
    """pictures: alpha of the Beta distribution that says how training pictures are blended in twos; 0: never"""
    cutmix: float = number(0.0, 0, 1000)
    """pictures: alpha of the same for rectangles of one pasted into another; with mixup, either by chance;
    0: never"""
    random_erasing: float = number(0.0, 0, 1)
    """pictures: share of training pictures of which a random rectangle becomes the mean"""
    ema_decay: float = number(0.0, 0, 1, below=True)
    """what remains in a step of the moving average of weights, BatchNorm and scalars, which is then what is validated,
    kept as best.pt and as the model of last.pt; 0: no average"""
    drop_path: float | None = number(None, 0, 1, below=True)
    """stochastic depth, of networks of other libraries that have it: chance that a residual branch is left out in
    training, rising to this from block to block; null: as the library has it"""


@dataclass
class RecipeConfig:
    """The full-precision recipe of a network on a data set, a stage a mode; quantized runs use it unmodified."""

    name: str = MISSING
    """what messages call it"""
    device_batch: int | None = number(None, 1, _SAMPLES)
    """samples that a device saw at a time where the recipe was published, over which BatchNorm and the scalars of
    activations were taken; a run is told how it compares, and does not follow it; null: not published"""
    scratch: StageConfig | None = None
    retrain: StageConfig | None = None
    long_retrain: StageConfig | None = None
    finetune: StageConfig | None = None
    distill: Distill = Distill.none
    """none, or full_precision: learn from the logits of the full-precision network in `teacher` as well"""
    teacher: str | None = path(None)
    """weights file of that network, as `weights`, or "pretrained"; null: `weights` themselves"""
    teacher_model: str | None = None
    """another network that `teacher` holds, by a name as of `model`; null: the one that is trained"""
    teacher_part: str | None = None
    """part of that file, as `weights_part`"""
    distill_temperature: float = number(4.0, 0, 1e6, above=True)
    """what logits of both are divided by, above 0"""
    distill_weight: float = number(0.5, 0, 1, above=True)
    """share of the teacher in the loss, above 0 to 1; the labels have the rest"""
    freeze_scalars_at: float | None = number(None, 0, _EPOCHS, above=True)
    """epoch, or a part of one, from which on the scalars of activations are static, at their running average, so that
    training gets used to what static inference will see; null: never"""
    batchnorm_batches: int = number(0, 0, _SAMPLES)
    """training batches on which the network as it is used takes mean and variance of every BatchNorm anew after the
    last epoch, before it is validated; 0: they stay the moving averages of training"""

    def stages(self) -> list[tuple[str, StageConfig]]:
        """Those that there are, by name."""
        return [(name, stage) for name in STAGES if (stage := getattr(self, name)) is not None]


@dataclass
class AllocationConfig:
    """How bits are chosen, tensor by tensor: mode=allocate, bits=auto."""

    price: str = "gradient"
    """what few bits cost a tensor: gradient (squared gradients of the loss times squared errors), measured (the rise
    of the loss with this tensor alone quantized; slow), or noise (errors alone)"""
    widths: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8], metadata=within(2, 16))
    """bits that are chosen from"""
    same: bool = False
    """both operands of a layer or product are to have the same bits"""
    batches: int = number(16, 1, _SAMPLES)
    """training batches that tensors are priced on"""
    batch_size: int = number(32, 1, _SAMPLES)
    """samples of each"""
    cost: str = "mean_bits"
    """what the front goes by, and max_drop has least of: mean_bits, size_mb, bitops, traffic_mb or latency_ms"""
    latencies: str | None = path(None)
    """JSON file of measured latencies: layer -> bits of its operands, as "4x8" for weight and input -> milliseconds"""


@dataclass
class OscillationsConfig:
    """Weights that flip between two codes in training, and what is done about it (Nagel et al. 2022)."""

    measure: bool = False
    """record after each epoch, weight by weight, which share oscillates; takes 9 bytes for each element"""
    momentum: float = number(0.01, 0, 1, above=True)
    """what a step weighs in the moving averages of flips, and of codes"""
    threshold: float = number(0.005, 0, 1, below=True)
    """flips a step from which on an element counts as oscillating"""
    max_bits: int = number(4, 2, 16)
    """weights of more bits are neither watched nor frozen: a code of theirs makes little difference"""
    freeze_to: float | None = number(None, 0, 1, below=True)
    """flips a step, at the end of training, above which an element is frozen at its mean code; null: none is"""
    freeze_from: float = number(0.1, 0, 1)
    """the same at the start; in between it falls by half a cosine"""
    dampening: float = number(0.0, 0, _LARGE)
    """weight, at the end of training, of the squared distance of weights from their codes in the loss; it rises from 0
    by half a cosine"""

    @property
    def watching(self) -> bool:
        """Whether codes are followed from step to step."""
        return self.measure or self.freeze_to is not None


@dataclass
class ConfigSchema:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    clipping: ClippingSchema = field(default_factory=ClippingSchema)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    oscillations: OscillationsConfig = field(default_factory=OscillationsConfig)

    mode: Mode = Mode.auto
    """scratch: train from random weights; finetune: from model.checkpoint; retrain, long_retrain: from `weights`; ptq:
    quantize `weights`; allocate: choose bits for them, as qat-bits does; evaluate: as it is; auto: finetune on texts,
    where the recipe has it, else scratch"""
    weights: str | None = path(None)
    """.pt, .pth, .th, .ckpt, .bin, .tar or .safetensors file, or the folder or .index.json of sharded ones;
    "pretrained" for what the model's own library publishes; "torchvision" for the first that torchvision published,
    those of the paper; "baseline" for the full-precision run of the same network, data, recipe and seed in mode auto,
    which is made first where it is missing"""
    weights_part: str | None = None
    """of a file that holds several networks: the key it keeps one under, such as state_dict_ema, or how the names of
    its tensors begin; null: the one that fits the model, raw weights before averaged ones"""

    bits: int = 4
    """bits of weights and activations, 2 to 16; 32 is the full-precision baseline"""
    weight_bits: int | None = None
    """bits of weights; null: bits"""
    activation_bits: int | None = None
    """bits of activations; null: bits"""
    first_last_bits: int | None = None
    """bits of the first convolution and the last linear layer, weights and inputs; null: 8, but not on texts"""
    quantize_head: bool | None = None
    """quantize the last linear layer (a classifier at first_last_bits); null: yes, but not on texts"""
    conv_granularity: str = "channel"
    """clipping scalars of a convolution weight: channel (one per output channel) or tensor"""
    linear_granularity: str = "auto"
    """clipping scalars of a linear weight: channel (one per output feature) or tensor; auto: channel on texts"""
    activation_granularity: str = "tensor"
    """clipping scalars of an activation: tensor, or token (one for each token that a linear layer, an expert or the
    scores of attention are given, solved as it comes; other activations have one per tensor still)"""
    format: str = "int"
    """what a number looks like: int; int_affine, with a zero point, a lower and an upper end in place of one scalar; or
    what an installed package adds"""
    weight_format: str | None = None
    """of weights; null: format"""
    activation_format: str | None = None
    """of activations; null: format"""
    range: str = "twos_complement"
    """which codes plain integers have: twos_complement, with none at +s; full, one at either end; oriented, two's
    complement whose scale has a sign, so that the code at the end serves the larger side"""
    weight_range: str | None = None
    """of weights; null: range"""
    activation_range: str | None = None
    """of activations; where none is below zero, full and oriented mean the same, a code at s; null: range"""
    rules: list[Any] = field(default_factory=list)
    """exceptions by layer or tensor, a later one overrides: [{match: layer4.*, bits: 3}, {match: "*.weight", ...}]; see
    the page about policies"""
    policy: str | None = path(None)
    """YAML file of such rules, which come before those of `rules`; auto, which bits=auto is short for: those that
    qat-bits finds under the same limits, which is run first"""
    budget: float | None = number(None, 2, 16)
    """where bits are chosen: mean bits, at most, of weights and of activations, over the elements of those whose bits
    no rule says, nor first_last_bits"""
    size_mb: float | None = number(None, 0, _LARGE, above=True)
    """where bits are chosen: megabytes (10^6 bytes) of the stored network, at most"""
    bitops: float | None = number(None, 0, _LARGE, above=True)
    """where bits are chosen: 10^9 bit operations for one sample, at most: multiply-accumulates times the bits of both
    factors"""
    traffic_mb: float | None = number(None, 0, _LARGE, above=True)
    """where bits are chosen: megabytes of operands that are read for one sample, at most"""
    latency_ms: float | None = number(None, 0, _LARGE, above=True)
    """where bits are chosen: milliseconds for one sample, at most, by allocation.latencies"""
    max_drop: float | None = number(None, 0, _LARGE)
    """where bits are chosen: the least of them that cost the metric so much, at most, against full precision"""
    retrain_steps: int = number(0, 0, _BATCHES)
    """where bits are chosen: training steps, of the recipe's stage retrain, before networks are measured"""

    epochs: int | None = number(None, 1, _EPOCHS)
    """times that the training data are gone through; null: the recipe's"""
    batch_size: int | None = number(None, 1, _SAMPLES)
    """samples a step, over all devices; null: the recipe's"""
    lr: float | None = number(None, 0, _LARGE, above=True)
    """learning rate before any decay; null: the recipe's, with another batch_size in proportion to it, or for AdamW to
    its square root"""
    accumulate: int = number(1, 1, _SAMPLES)
    """parts that each batch is computed in, gradients adding up: less memory for the same batch size"""
    seed: int = number(0, 0, 2**32 - 1)
    """of initialization, data order and augmentation; 0 to 2^32 - 1"""
    backend: str = "auto"
    """of the quantization kernels: auto, eager (plain PyTorch), compiled (C++, CPU) or triton (CUDA)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    amp: Amp = Amp.none
    """none, bf16 or fp16: autocast of convolutions and matrix products. With none, PyTorch has GPUs convolve in TF32,
    which rounds what is multiplied to eleven significant bits"""
    channels_last: bool = True
    """memory layout of weights and pictures: the faster one, on CPUs as on GPUs"""
    cudnn_benchmark: bool = False
    """on a GPU: time the algorithms of each convolution when it first meets a shape, and take the fastest. Which one
    that is may differ from sitting to sitting, and with it the last bits of all that follows: so it is another run than
    one without it, and does not repeat to the bit"""
    compile: bool = False
    """training steps of a network that torch.compile has made one graph of: faster after a start of minutes, and with
    other last bits"""
    limit_train_batches: int | None = number(None, 1, _BATCHES)
    """at most so many batches an epoch; null: all"""
    limit_val_batches: int | None = number(None, 1, _BATCHES)
    """at most so many validation batches; null: all"""
    noise_batches: int = number(1, 0, _BATCHES)
    """validation batches on which quantization noise is measured after each epoch; 0: never"""

    sync_batchnorm: bool = False
    """of several processes: BatchNorm over the batch of all together"""
    distributed_timeout: float = number(600.0, 0, 1e6, above=True)
    """of several processes: seconds after which one that waits for another gives up"""
    checkpoint_minutes: float = number(10.0, 0, 1e6, above=True)
    """a checkpoint is written so often, and at the end of each epoch"""

    sweep: dict[str, str] = field(default_factory=dict)
    """of an experiment: what -m sweeps over, unless the command line names the key"""
    standins: dict[str, str] = field(default_factory=dict)
    """of a stand_in: what takes the place of values in `sweep`"""

    schema_version: int = SCHEMA_VERSION
    """of this schema; filled in by the runner"""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """of the files and folders that this config names, as a run found them; filled in by the runner"""

    allocated: list[Any] = field(default_factory=list)
    """of bits=auto: the rules that it came to; filled in by the runner"""

    given: list[str] = field(default_factory=list)
    """keys of preprocessing that the command gives, and a model's own leave alone; filled in by the runner"""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """where figures are shown beside the run's own files: tensorboard, wandb, mlflow, or what an installed package
    adds; none: nowhere"""

    log_excess_mse: bool = False
    """add to steps.csv what warm-started scalars cost in MSE over converged ones (slow)"""

    data_dir: str = path("data")
    """where data sets lie; by default the environment variable QAT_DATA_DIR, else ./data"""
    runs_dir: str = path("runs")
    """where run folders are made"""
    run_dir: str | None = path(None)
    """this run's folder; null: a folder in runs_dir named after the config"""
    overwrite: bool = False
    """start anew where the run folder exists; otherwise a finished run is shown and an unfinished one resumed"""
    resume: Resume = Resume.auto
    """auto: go on with an unfinished run of the same config; force: of another config, too; never: refuse"""

    @property
    def training(self) -> bool:
        return self.mode in STAGES

    @property
    def allocating(self) -> bool:
        """Whether bits are chosen, here or first."""
        return self.mode == Mode.allocate or self.policy == AUTO

    @property
    def limits(self) -> dict[str, float]:
        """What bits may cost in all, by key."""
        return {key: most for key in LIMITS if (most := getattr(self, key)) is not None}

    @property
    def asked_bits(self) -> str:
        """Where bits are chosen: what may be lost, or what they may cost, as in "budget=4"."""
        asked = self.limits or {"max_drop": self.max_drop or 0.0}
        return ", ".join(f"{key}={most:g}" for key, most in asked.items())

    @property
    def preprocessed(self) -> bool:
        """Whether pictures are what the model's library says."""
        wanted = self.dataset.preprocessing
        follows = wanted == Preprocessing.model or (wanted == Preprocessing.auto and self.weights == PRETRAINED)
        return follows and "dataset.mean" not in foreign_keys(self.task)

    @property
    def task(self) -> TaskFacts:
        """What follows from the task of the data set.

        Raises:
            ConfigError: there is no such task.
        """
        if self.dataset.task not in FACTS:
            raise ConfigError(f"dataset.task={self.dataset.task}: must be one of {', '.join(FACTS)}")
        return FACTS[self.dataset.task]

    @property
    def stage(self) -> StageConfig:
        """The recipe's stage that this mode uses; one that does not train takes its batch size from mode auto's.

        Raises:
            ConfigError: the recipe has none.
        """
        mode = self.mode if self.training else self.auto_mode
        stage: StageConfig | None = getattr(self.recipe, mode)
        if stage is None:
            has = ", ".join(name for name, _ in self.recipe.stages())
            raise ConfigError(f"mode={mode}: recipe={self.recipe.name} has no such stage, only {has}")
        return stage

    @property
    def auto_mode(self) -> Mode:
        """What mode=auto stands for: the first that needs no `weights`, of those that the recipe has."""
        starts = [Mode(mode) for mode in self.task.modes if mode in (Mode.scratch, Mode.finetune)]
        return next((mode for mode in starts if getattr(self.recipe, mode) is not None), Mode(self.task.modes[0]))


@dataclass
class Config(ConfigSchema):
    """A resolved config: what follows from the rest is filled in (see `resolving`). Null means that there is none."""

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
        return self.mode in (Mode.retrain, Mode.long_retrain)

    @property
    def clipping_in_mode(self) -> ClippingConfig:
        """`clipping` with what null means in this mode: OCTAV makes up for what the paper neglects where no training
        does. `clipping` itself keeps what was asked for, since a config that follows from this one may be of another
        mode, such as the probes of qat-bits that are retrained."""
        usual: dict[str, Any] = {}
        if self.mode in (Mode.ptq, Mode.allocate) and self.clipping.name == Octav.name:
            usual = {"missing_code": True, "refine": 0 if self.clipping.sync else 64}
        missing = {key: value for key, value in usual.items() if getattr(self.clipping, key) is None}
        return replace(self.clipping, **missing)

    @property
    def told_bits(self) -> int | str:
        """Bits of weights and activations: one number if they are the same, else "4/8"; or what they are chosen for."""
        if self.allocating:
            return self.asked_bits
        both = self.weight_bits, self.activation_bits
        return both[0] if both[0] == both[1] else f"{both[0]}/{both[1]}"

    @property
    def distilling(self) -> bool:
        return self.training and self.recipe.distill != Distill.none

    @property
    def freezing(self) -> bool:
        """Whether activations' scalars are static in the last part of training."""
        return self.quantized_training and self.recipe.freeze_scalars_at is not None

    @property
    def quantized_training(self) -> bool:
        """Whether a network is trained with quantizers."""
        return self.training and not self.quantization.full_precision

    @property
    def reestimating(self) -> bool:
        """Whether BatchNorm's statistics are taken anew after training."""
        return self.training and self.recipe.batchnorm_batches > 0

    @property
    def remedies(self) -> list[str]:
        """What is done beside quantizing and training, a word each."""
        how, quantized = self.oscillations, self.quantized_training
        frozen, dampened = quantized and how.freeze_to is not None, quantized and how.dampening > 0
        words = {"frozen": frozen, "dampened": dampened, "batchnorm": self.reestimating}
        return [word for word, done in words.items() if done]

    @property
    def all_learned(self) -> bool:
        """Whether all scalars are learned, by methods that have gradients of their own; no rule gives another."""
        others = (rule.clipping for rule in self.quantization.rules if rule.clipping is not None)
        return self.clipping.learned and all(method.learned for method in others)

    @property
    def all_static(self) -> bool:
        """Whether all scalars are found before training, or without it; no rule says otherwise."""
        return not (self.clipping.dynamic or self.clipping.learned or self.rules)

    @property
    def told_remedies(self) -> list[str]:
        """`remedies`, and mixed where rules make exceptions."""
        return [*(["mixed"] if self.rules else []), *self.remedies]

    @property
    def of_teacher(self) -> "Config":
        """The same with the network of the teacher, which is not trained."""
        name = self.recipe.teacher_model
        model = self.model if name is None else ModelConfig(name=name, stem=self.model.stem)
        return replace(self, model=model, mode=Mode.evaluate)

    def content(self, path: str) -> str:
        """A fingerprint of what is at a path, as the run found it, or as it is now; of no path, the word itself."""
        return path if path in WORDS_OF_WEIGHTS else self.fingerprints.get(path) or fingerprint(path)

    def with_fingerprints(self) -> "Config":
        """With `fingerprints` of all that it names: what a run's config.yaml holds, so that files may move later."""
        named = {self.weights, self.recipe.teacher, self.model.checkpoint, checkpoint_of(self.model.name)}
        named |= {self.allocation.latencies}
        paths = sorted(path for path in named if path is not None and path not in WORDS_OF_WEIGHTS)
        return replace(self, fingerprints={path: self.content(path) for path in paths})

    @property
    def quantization(self) -> Policy:
        """What every tensor of a resolved config gets.

        Raises:
            ConfigError: it makes no policy.
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
                # what a rule gives another method is dynamic beside learned scalars, too, unless it says otherwise
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
        """Whether scalars must be found on training batches before the first use."""
        return self.mode not in (Mode.allocate, Mode.evaluate) and self._needs_calibration_in(self.mode)

    @property
    def calibrates_probes(self) -> bool:
        """The same of the networks that are measured on the way to bits."""
        return self.allocating and self._needs_calibration_in(Mode.retrain if self.retrains_probes else Mode.ptq)

    @property
    def retrains_probes(self) -> bool:
        """Whether networks are retrained on the way to bits, so that what these are trained by decides about bits."""
        return self.allocating and self.retrain_steps > 0

    def _needs_calibration_in(self, mode: Mode) -> bool:
        policy = self.quantization
        wanted = policy.needs_calibration or (self.clipping.eval_mode != "dynamic" and mode == Mode.ptq)
        return wanted and not policy.full_precision
