"""The tensors of a run's network, or of a network from a weights file, as quantizers see them."""

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
from qat_runner.wording import one_of

Look = Callable[[QuantizedTensor, Tensor], None]


def network_of_run(folder: Path) -> tuple[nn.Module, Data, Config]:
    """Return the trained network on the CPU with 4-bit quantizers, whatever it was trained with; its data; its config.

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
    """Return an image network on the CPU with weights from a file and 4-bit quantizers, and its data if requested.

    Args:
        model, weights, dataset: as for `qat-run`.
        data_dir: location of the data set; None if no data are needed.

    Raises:
        ConfigError: the network, file or data do not exist, or do not fit together.
    """
    from qat_runner.experiment import build

    if model not in MODELS:
        raise ConfigError(f"--model {model}: {one_of(model, MODELS)}")
    if (found := library_of(model)) is not None:
        library, own = found
        library.check(own)
    fitting = [name for name, known in DATASETS.sound() if model in TASKS[known.task].networks]
    if dataset not in fitting:
        raise ConfigError(f"--dataset {dataset}: {one_of(dataset, fitting)}")
    source = Source(weights)
    find_weights(source, model)
    config = from_hydra(compose_config([f"model={quoted(model)}", f"dataset={dataset}", "bits=4"]))
    config = replace(config, device="cpu", data_dir=config.data_dir if data_dir is None else str(data_dir))
    config = resolve(replace(config, mode=Mode.evaluate, weights=weights))
    if data_dir is not None:
        return build(config, weights)
    task = task_of(config)
    if not task.knows_head(config):
        raise ConfigError(f"--dataset {dataset}: classes are counted in the data, so --data-dir is needed")
    network = task.network(config, None)
    load_weights(network, source, model, new_head=False)
    return insert(network, config.quantization), None


def look_at_weights(model: nn.Module, look: Look) -> None:
    """Call `look` for each weight, in order of registration.

    Args:
        model: network with quantizers.
        look: called with the name and quantizer of the tensor, and with the tensor.
    """
    for tensor in quantized_tensors(model):
        if tensor.tensor == "weight":
            layer = tensor.module
            assert isinstance(layer, QuantLayer)
            look(tensor, layer.qat_used_weight().detach())


def look_at(model: nn.Module, data: Data, batch_size: int, batches: int, look: Look) -> None:
    """Call `look` for each activation of each batch, and once for each weight; the network runs in full precision.

    Args:
        model: network with quantizers; runs in eval mode.
        data: provides the first training batches, of an epoch that training never uses.
        batch_size: samples per batch.
        batches: number of batches.
        look: called with the name and quantizer of the tensor, and with the tensor in the shape that its scalars match.
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
