"""The tensors of a finished run's network, as its quantizers would see them: for figures and timings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from qat_runner.config import ClippingConfig, Config, load_config, resolve
from qat_runner.data import Data
from qat_runner.errors import ConfigError
from qat_runner.insertion import QuantizedTensor, quantized_tensors
from qat_runner.insertion.insert import quantizers_disabled
from qat_runner.insertion.watch import watch
from qat_runner.quant import Quantizer

Look = Callable[[QuantizedTensor, Tensor], None]


def network_of_run(folder: Path) -> tuple[nn.Module, Data, Config]:
    """The trained network with 4-bit quantizers, whatever it was trained with, and its data, on the CPU.

    Raises:
        ConfigError: the folder holds no run with a checkpoint.
    """
    from qat_runner.experiment import build

    config, checkpoint = load_config(folder), folder / "checkpoints" / "last.pt"
    if config is None or not checkpoint.is_file():
        raise ConfigError(f"{folder}: holds no run with a checkpoint")
    config = replace(config, device="cpu", backend="auto")
    config = replace(
        config, mode="evaluate", weights=str(checkpoint), weights_part=None, clipping=ClippingConfig(name="octav")
    )
    config = resolve(replace(config, bits=4, weight_bits=4, activation_bits=4))
    return *build(config, config.weights), config


def look_at(model: nn.Module, data: Data, batch_size: int, batches: int, look: Look) -> None:
    """Show each activation of each batch, and each weight once, the network computing in full precision in eval mode.

    Args:
        model: with quantizers.
        data: its first training batches are used, of an epoch that no training sees.
        batch_size: samples a batch.
        batches: how many.
        look: is given the place and the tensor.
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
        look(tensor, x)

    with quantizers_disabled(model):
        watch(model, (batch.inputs for batch in data.train_batches(batch_size, CALIBRATION_EPOCH, batches)), show)
