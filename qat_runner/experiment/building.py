"""config -> data and model, weights loaded, quantizers in place and calibrated."""

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
"""The number of the epoch whose first batches calibrate: one that training never comes to."""
EXAMPLE = 2
"""Samples that a network is seen at work on when it gets its quantizers."""


def find_device(name: str) -> torch.device:
    """auto -> a GPU if there is one, else the CPU; any other name must exist.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", ranks.local_rank() % torch.cuda.device_count())
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    found = re.fullmatch("cuda(?::([0-9]+))?", name)
    if found is None:
        raise ConfigError(f"device={name}: must be auto, cpu, cuda or cuda:N")
    if int(found[1] or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device={name}: this machine has {count} of the kind")
    return torch.device(name)


def model_for(config: Config, data: Data) -> nn.Module:
    """The network without quantizers, on the device of the data and in its layout."""
    model = task_of(config).network(config, data, pretrained=config.mode == Mode.finetune).to(data.device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def try_policy(config: Config) -> tuple[nn.Module, Data]:
    """Refuse a policy that does not go with the network, before other runs are made for this one; returns network and
    data as `build` does, but without the weights.

    Raises:
        ConfigError: it does not, or data turn out not to fit.
    """
    with warnings.catch_warnings(action="ignore", category=QuantizationWarning):  # for the run itself to tell
        model, data = _with_quantizers(config)
    if config.policy != AUTO:  # which bits there are to train is not known yet
        check_training(config, model)
    return model, data


def build(config: Config, weights: str | None) -> tuple[nn.Module, Data]:
    """The data and the model of a run, weights loaded, quantizers in place and calibrated.

    Args:
        config: resolved.
        weights: as config.weights, "baseline" replaced by a file.

    Raises:
        ConfigError: data or weights turn out not to fit.
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
    if rank > 0:  # its own dropout
        checkpoint.seed_everything(config.seed + 2**32 * rank)
    return model, data


def _with_quantizers(config: Config) -> tuple[nn.Module, Data]:
    """The data and the model of a run, quantizers in place."""
    device = find_device(config.device)
    shard = distributed.shard()
    if device.index is not None:  # what is about the current one, such as the state of its generator, is about this
        torch.cuda.set_device(device)
    checkpoint.seed_everything(config.seed)
    set_backend(config.backend, device.type)
    torch.backends.cudnn.deterministic = True  # algorithms that repeat to the bit: the same ones, unless they are timed
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    keep_freed_memory()
    delivery = Delivery(device, config.seed, config.channels_last, task_of(config).tokenizer(config), shard)
    data = load_dataset(config.dataset, config.data_dir, delivery)
    if config.training and data.train_size < shard.world:
        few = f"{data.train_size} training samples are too few for {shard.world} processes"
        raise ConfigError(f"dataset={config.dataset.name}: {few}")
    model = model_for(config, data)
    # Real samples, the same in every process: it is seen what the model does with them.
    example = _example(data)
    policy = config.quantization
    try:
        insert(model, pricing_policy(policy) if config.mode == Mode.allocate else policy, example)
    except PolicyError as error:
        raise ConfigError(f"model={config.model.name}: {error}") from error
    except (AssertionError, RuntimeError, ValueError) as error:  # pictures too small, a batch too small for BatchNorm
        raise ConfigError(
            f"model={config.model.name}: cannot take a batch of {config.dataset.name} ({' '.join(str(error).split())})"
        ) from error
    return model, data


def _example(data: Data) -> tuple[Tensor, ...]:
    """Inputs of EXAMPLE samples of training, where some may be left out of the first of many more."""
    some = EXAMPLE if data.corrupt is None else 32 * EXAMPLE
    inputs = next(unsharded(data).train_batches(some, epoch=0, limit=1)).inputs
    return tuple(t[:EXAMPLE] for t in inputs)


def check_training(config: Config, model: nn.Module) -> None:
    """Refuse what training is to do where the network has nothing that it could be done to."""
    how, quantized = config.oscillations, config.quantized_training
    if config.freezing and not dynamic_activations(model):
        at = f"recipe.freeze_scalars_at={config.recipe.freeze_scalars_at:g}"
        raise ConfigError(f"{at}: {config.model.name} has no activations whose scalars are dynamic and could be static")
    if quantized and how.watching and not latent_weights(model, how.max_bits):
        raise ConfigError(
            f"oscillations.max_bits={how.max_bits}: {config.model.name} has no weight of so few bits whose codes could "
            f"be watched"
        )
    if quantized and how.dampening and not latent_weights(model):
        raise ConfigError(f"oscillations.dampening={how.dampening:g}: {config.model.name} has no weights to dampen")
    if config.reestimating and not norms(model):
        raise ConfigError(
            f"recipe.batchnorm_batches={config.recipe.batchnorm_batches}: {config.model.name} has no BatchNorm"
        )


def _check_scalars(config: Config, model: nn.Module, weights: str | None) -> None:
    """Refuse to measure a network whose scalars are not there, or not what the config says of them."""
    tensors = quantized_tensors(model)
    for tensor in tensors:
        wanting, policy = not tensor.quantizer.ready, wanted(model, tensor)
        wants_static = not (policy.dynamic or policy.clipping.learned)
        if wanting or (wants_static and tensor.quantizer.dynamic):
            what = "no" if wanting else "no static"
            raise ConfigError(
                f"weights={weights}: holds {what} clipping scalars for {tensor.name} at these bits, which "
                f"clipping={clipping_label(config)} wants to be given; mode=ptq calibrates them"
            )
    static = [tensor for tensor in tensors if tensor.quantizer.mode == "static"]
    if static and config.clipping.dynamic:
        log.info(f"{len(static)} of {len(tensors)} quantized tensors have static clipping scalars, as in {weights}")


def load_teacher(config: Config, data: Data, weights: str | None) -> nn.Module:
    """The full-precision network that a distilled one learns from, in eval mode; weights as `build` takes them."""
    recipe = config.recipe
    if recipe.teacher is not None:
        source = Source(recipe.teacher, recipe.teacher_part, "recipe.teacher", config.dataset.image_size)
    elif weights is not None:
        source = Source(weights, config.weights_part, image_size=config.dataset.image_size)
    else:
        raise ConfigError("recipe.teacher=null: there are no weights to learn from")
    own = config.of_teacher
    teacher = model_for(own, data)
    loaded = load_weights(teacher, source, own.model.name, new_head=False)
    log.info(f"teacher {source.value}: {loaded}")
    return teacher.eval().requires_grad_(False)


def _calibrate(config: Config, model: nn.Module, data: Data) -> None:
    """Section 5: mean scalars of a few random training batches; those of an epoch that training never uses."""
    count, size = config.clipping.calibration_batches, config.clipping.calibration_batch_size
    batches = unsharded(data).train_batches(size, CALIBRATION_EPOCH, count)
    try:
        used = calibrate(model, (batch.inputs for batch in batches))
    except ValueError as error:
        raise ConfigError(f"calibration failed: {error}") from error
    log.info(f"scalars calibrated on {used} training batches of {size}")
