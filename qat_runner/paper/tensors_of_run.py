"""The tensors of a network, of a run or of a file, as its quantizers would see them: for figures and timings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from qat_runner.config import Config, Mode, from_hydra, load_config, resolve
from qat_runner.config.composing import compose_config, quoted
from qat_runner.config.resolving import changed
from qat_runner.config.schema import ClippingSchema
from qat_runner.data import DATASETS, Data
from qat_runner.errors import ConfigError
from qat_runner.insertion import QuantizedTensor, quantized_tensors
from qat_runner.insertion.insert import insert, quantizers_disabled
from qat_runner.insertion.layers import QuantLayer
from qat_runner.insertion.watch import watch
from qat_runner.models import MODELS, Source, find_weights, library_of, load_weights
from qat_runner.quant import Quantizer
from qat_runner.runs.folder import RunFolder
from qat_runner.tasks import TASKS, task_of
from qat_runner.training.checkpoint import LAST

Look = Callable[[QuantizedTensor, Tensor], None]


def network_of_run(folder: Path) -> tuple[nn.Module, Data, Config]:
    """The trained network with 4-bit quantizers, whatever it was trained with, and its data, on the CPU.

    Raises:
        ConfigError: the folder holds no run with a checkpoint.
    """
    from qat_runner.experiment import build

    config, checkpoint = load_config(folder), RunFolder(folder).checkpoints / LAST
    if config is None or not checkpoint.is_file():
        raise ConfigError(f"{folder}: holds no run with a checkpoint")
    config = changed(
        replace(config, device="cpu", backend="auto", mode=Mode.evaluate, weights=str(checkpoint), weights_part=None),
        **dict.fromkeys(("bits", "weight_bits", "activation_bits"), 4),
        clipping=ClippingSchema(name="octav"),
    )
    return *build(config, config.weights), config


def network_of_weights(model: str, weights: str, dataset: str, data_dir: Path | None) -> tuple[nn.Module, Data | None]:
    """A network for pictures with weights of a file and 4-bit quantizers, and the data if it is said where, on the CPU.

    Args:
        model, weights, dataset: as `qat-run` takes them.
        data_dir: where the data set lies; None: no data are needed.

    Raises:
        ConfigError: no such network, file or data, or they do not fit.
    """
    from qat_runner.experiment import build

    if model not in MODELS:
        raise ConfigError(f"--model {model}: must be one of {', '.join(MODELS)}")
    if (found := library_of(model)) is not None:
        library, own = found
        library.check(own)
    fitting = [name for name, known in DATASETS.sound() if model in TASKS[known.task].networks]
    if dataset not in fitting:
        raise ConfigError(f"--dataset {dataset}: must be one of {', '.join(fitting)}")
    source = Source(weights)
    find_weights(source, model)
    config = from_hydra(compose_config([f"model={quoted(model)}", f"dataset={dataset}", "bits=4"]))
    config = replace(config, device="cpu", data_dir=config.data_dir if data_dir is None else str(data_dir))
    config = resolve(replace(config, mode=Mode.evaluate, weights=weights))
    if data_dir is not None:
        return build(config, weights)
    task = task_of(config)
    if not task.knows_head(config):
        raise ConfigError(f"--dataset {dataset}: has any number of classes; --data-dir says where to count them")
    network = task.network(config, None)
    load_weights(network, source, model, new_head=False)
    return insert(network, config.quantization), None


def look_at_weights(model: nn.Module, look: Look) -> None:
    """Show each weight, in order of registration.

    Args:
        model: with quantizers.
        look: is given the place and the tensor.
    """
    for tensor in quantized_tensors(model):
        if tensor.tensor == "weight":
            layer = model.get_submodule(tensor.layer)
            assert isinstance(layer, QuantLayer)
            look(tensor, layer.qat_used_weight().detach())


def look_at(model: nn.Module, data: Data, batch_size: int, batches: int, look: Look) -> None:
    """Show each activation of each batch, and each weight once, the network computing in full precision in eval mode.

    Args:
        model: with quantizers.
        data: its first training batches are used, of an epoch that no training sees.
        batch_size: samples a batch.
        batches: how many.
        look: is given the place and the tensor, in the shape that its scalars are of.
    """
    from qat_runner.experiment import CALIBRATION_EPOCH

    tensors = {tensor.quantizer: tensor for tensor in quantized_tensors(model)}
    seen_weights: set[str] = set()

    def show(quantizer: Quantizer, x: Tensor) -> None:
        tensor = tensors[quantizer]
        if tensor.tensor == "weight":
            if tensor.name in seen_weights:
                return
            seen_weights.add(tensor.name)
        look(tensor, quantizer.rows(x))

    with quantizers_disabled(model):
        watch(model, (batch.inputs for batch in data.train_batches(batch_size, CALIBRATION_EPOCH, batches)), show)
