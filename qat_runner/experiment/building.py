"""Building a run from its config: data and model, with weights loaded and quantizers inserted and calibrated."""

import logging
import re
import warnings

import torch
from torch import Tensor, nn

from qat_runner import distributed, ranks
from qat_runner.allocation import pricing_policy
from qat_runner.config import AUTO, Config, Mode, clipping_label
from qat_runner.data import Data, Delivery, load_dataset
from qat_runner.data.batches import unsharded
from qat_runner.errors import ConfigError
from qat_runner.insertion import calibrate, quantized_tensors
from qat_runner.insertion.insert import QuantizationWarning, insert, wanted
from qat_runner.models import Source, load_weights
from qat_runner.policy import PolicyError
from qat_runner.quant.kernels import set_backend
from qat_runner.tasks import task_of
from qat_runner.training import checkpoint
from qat_runner.training.batch_norm import norms
from qat_runner.training.freezing import dynamic_activations
from qat_runner.training.latent import latent_weights
from qat_runner.training.memory import keep_freed_memory

log = logging.getLogger("qat_runner")


CALIBRATION_EPOCH = 10**6
"""The epoch whose first batches are used for calibration; training never reaches it."""
EXAMPLE = 2
"""Number of samples in the example input on which a network is observed when quantizers are inserted."""


def find_device(name: str) -> torch.device:
    """Return the device for a name; auto selects a GPU if there is one, otherwise the CPU.

    Raises:
        ConfigError: the name is invalid or this machine has no such device.
    """
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", ranks.local_rank() % torch.cuda.device_count())
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    found = re.fullmatch("cuda(?::([0-9]+))?", name)
    if found is None:
        raise ConfigError(f"device={name}: must be auto, cpu, cuda or cuda:N")
    if int(found[1] or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device={name}: this machine has {count} CUDA device(s)")
    return torch.device(name)


def model_for(config: Config, data: Data) -> nn.Module:
    """Return the network without quantizers, on the device of the data and in the memory layout of the config."""
    model = task_of(config).network(config, data, pretrained=config.mode == Mode.finetune).to(data.device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def try_policy(config: Config) -> tuple[nn.Module, Data]:
    """Check that the policy fits the network, before other runs are carried out for this one.

    Returns:
        Network and data as returned by `build`, but without weights loaded.

    Raises:
        ConfigError: the policy does not fit the network, or the data do not.
    """
    with warnings.catch_warnings(action="ignore", category=QuantizationWarning):  # the run itself reports them
        model, data = _with_quantizers(config)
    if config.policy != AUTO:  # with AUTO the bit-widths to train are not known yet
        check_training(config, model)
    return model, data


def build(config: Config, weights: str | None) -> tuple[nn.Module, Data]:
    """Return the model and the data of a run, with weights loaded and quantizers inserted and calibrated.

    Args:
        config: resolved config.
        weights: like config.weights, but with "baseline" replaced by a file.

    Raises:
        ConfigError: the data or the weights do not fit.
    """
    model, data = _with_quantizers(config)
    if weights is not None:
        as_it_is = config.mode == Mode.evaluate
        source = Source(weights, config.weights_part, image_size=config.dataset.image_size)
        loaded = load_weights(model, source, config.model.name, new_head=config.retraining, quantizers=as_it_is)
        log.info(f"weights {weights}: {loaded}")
    check_training(config, model)
    if config.needs_calibration:
        _calibrate(config, model, data)
    if config.mode in (Mode.ptq, Mode.evaluate):
        _check_scalars(config, model, weights)
    if config.sync_batchnorm:
        model = distributed.synchronize_batchnorm(model)
    distributed.broadcast(model)
    rank = distributed.shard().rank
    if rank > 0:  # so that each process draws its own dropout
        checkpoint.seed_everything(config.seed + 2**32 * rank)
    return model, data


def _with_quantizers(config: Config) -> tuple[nn.Module, Data]:
    """Return the model and the data of a run, with quantizers inserted but no weights loaded."""
    device = find_device(config.device)
    shard = distributed.shard()
    if device.index is not None:  # functions on the current device, such as its random state, then refer to it
        torch.cuda.set_device(device)
    checkpoint.seed_everything(config.seed)
    set_backend(config.backend, device.type)
    torch.backends.cudnn.deterministic = True  # bitwise repeatable; always the same algorithms unless benchmarked
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    keep_freed_memory()
    delivery = Delivery(device, config.seed, config.channels_last, task_of(config).tokenizer(config), shard)
    data = load_dataset(config.dataset, config.data_dir, delivery)
    if config.training and data.train_size < shard.world:
        few = f"has {data.train_size} training samples, too few for {shard.world} processes"
        raise ConfigError(f"dataset={config.dataset.name}: {few}")
    model = model_for(config, data)
    # Real samples, the same in every process, because insertion observes what the model computes with them.
    example = _example(data)
    policy = config.quantization
    try:
        insert(model, pricing_policy(policy) if config.mode == Mode.allocate else policy, example)
    except PolicyError as error:
        raise ConfigError(f"model={config.model.name}: {error}") from error
    except (AssertionError, RuntimeError, ValueError) as error:  # images too small, a batch too small for BatchNorm
        raise ConfigError(
            f"model={config.model.name}: fails on a batch of {config.dataset.name} ({' '.join(str(error).split())})"
        ) from error
    return model, data


def _example(data: Data) -> tuple[Tensor, ...]:
    """Return the inputs of EXAMPLE training samples; more are read if corrupt samples may be skipped."""
    some = EXAMPLE if data.corrupt is None else 32 * EXAMPLE
    inputs = next(unsharded(data).train_batches(some, epoch=0, limit=1)).inputs
    return tuple(t[:EXAMPLE] for t in inputs)


def check_training(config: Config, model: nn.Module) -> None:
    """Reject settings of training that have no effect because the network lacks what they apply to."""
    how, quantized = config.oscillations, config.quantized_training
    if config.freezing and not dynamic_activations(model):
        at = f"recipe.freeze_scalars_at={config.recipe.freeze_scalars_at:g}"
        raise ConfigError(f"{at}: {config.model.name} has no dynamic activation scalars that could become static")
    if quantized and how.watching and not latent_weights(model, how.max_bits):
        raise ConfigError(
            f"oscillations.max_bits={how.max_bits}: {config.model.name} has no weight of so few bits whose codes could "
            f"be tracked"
        )
    if quantized and how.dampening and not latent_weights(model):
        raise ConfigError(f"oscillations.dampening={how.dampening:g}: {config.model.name} has no weights to dampen")
    if config.reestimating and not norms(model):
        raise ConfigError(
            f"recipe.batchnorm_batches={config.recipe.batchnorm_batches}: {config.model.name} has no BatchNorm"
        )


def _check_scalars(config: Config, model: nn.Module, weights: str | None) -> None:
    """Reject measuring a network whose clipping scalars are missing or are not static although the config says so."""
    tensors = quantized_tensors(model)
    for tensor in tensors:
        wanting, policy = not tensor.quantizer.ready, wanted(model, tensor)
        wants_static = not (policy.dynamic or policy.clipping.learned)
        if wanting or (wants_static and tensor.quantizer.dynamic):
            what = "no" if wanting else "no static"
            raise ConfigError(
                f"weights={weights}: holds {what} clipping scalars for {tensor.name} at this bit-width, which "
                f"clipping={clipping_label(config)} requires; mode=ptq calibrates them"
            )
    static = [tensor for tensor in tensors if tensor.quantizer.mode == "static"]
    if static and config.clipping.dynamic:
        log.info(f"{len(static)} of {len(tensors)} quantized tensors have static clipping scalars, as in {weights}")


def load_teacher(config: Config, data: Data, weights: str | None) -> nn.Module:
    """Return the full-precision teacher network for distillation, in eval mode; `weights` as in `build`."""
    recipe = config.recipe
    if recipe.teacher is not None:
        source = Source(recipe.teacher, recipe.teacher_part, "recipe.teacher", config.dataset.image_size)
    elif weights is not None:
        source = Source(weights, config.weights_part, image_size=config.dataset.image_size)
    else:
        raise ConfigError("recipe.teacher=null: must name weights, because the run starts without weights")
    own = config.of_teacher
    teacher = model_for(own, data)
    loaded = load_weights(teacher, source, own.model.name, new_head=False)
    log.info(f"teacher {source.value}: {loaded}")
    return teacher.eval().requires_grad_(False)


def _calibrate(config: Config, model: nn.Module, data: Data) -> None:
    """Calibrate static scalars: means over a few random training batches (section 5), of an epoch never trained on."""
    count, size = config.clipping.calibration_batches, config.clipping.calibration_batch_size
    batches = unsharded(data).train_batches(size, CALIBRATION_EPOCH, count)
    try:
        used = calibrate(model, (batch.inputs for batch in batches))
    except ValueError as error:
        raise ConfigError(f"calibration failed: {error}") from error
    log.info(f"clipping scalars calibrated on {used} training batches of {size}")
