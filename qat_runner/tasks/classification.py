"""Image classification."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import Config
from qat_runner.config.tasks import FACTS
from qat_runner.data import ImageData
from qat_runner.data.mixing import MIXING, Mixing
from qat_runner.errors import ConfigError, one_line
from qat_runner.models import MODELS, build_model, library_of
from qat_runner.tasks.task import Choice
from qat_runner.tasks.totals import Totals, top_five


class Classification(Choice[ImageData]):
    """Image classification: from images [N, 3, H, W] to logits [N, classes]. The metric is top-1 accuracy."""

    name = "classification"
    facts = FACTS[name]
    networks = MODELS
    mixes = True
    unit = "img"
    inputs = ("images",)
    outputs = ("logits",)

    def check(self, config: Config) -> None:
        """Check a config; see `Task.check`.

        Raises:
            ConfigError: as `Task.check`, or a network cannot be built with the given options.
        """
        super().check(config)
        found = library_of(config.model.name)
        if found is not None:
            library, name = found
            library.check(name)
        if found is None and not _changed(config):
            return
        try:
            with torch.device("meta"):
                self.network(config, None)
        except ConfigError:
            raise
        except Exception as error:  # libraries may raise any exception for invalid options
            reason = one_line(error) or type(error).__name__
            raise ConfigError(f"model={config.model.name}: cannot be built ({reason})") from error

    def network(self, config: Config, data: ImageData | None, pretrained: bool = False) -> nn.Module:
        """Return the network; it has 2 classes if neither data nor config specify their number."""
        classes, size = config.dataset.num_classes or 2, config.dataset.image_size
        if data is not None:
            classes, size = data.num_classes, data.image_size
        return build_model(
            config.model.name,
            classes,
            size,
            config.model.stem,
            config.model.width,
            stride_in=config.model.stride_in,
            bn_eps=config.model.bn_eps,
            drop_path=config.stage.drop_path if config.training else None,
        )

    def mixing(self, config: Config, data: ImageData) -> Mixing | None:
        if not any(getattr(config.stage, key) for key in MIXING):
            return None
        return Mixing(config.stage, data.num_classes, config.seed, data.shard)

    def knows_head(self, config: Config) -> bool:
        return config.dataset.num_classes is not None

    def right(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return predictions == targets

    def totals(self, device: torch.device) -> Totals:
        return Totals(device, ("top1", "top5"), top_five)

    def score(self, data: ImageData) -> Totals:
        return self.totals(data.device)

    def about(self, config: Config, data: ImageData) -> dict[str, Any]:
        return {
            "image": {
                "shape": ["N", 3, data.image_size, data.image_size],
                "channels": "red, green, blue; greyscale images have the same values in all three",
                "normalization": "(value in 0..1 - mean) / std, per channel",
                "mean": _of_channels(config.dataset.mean),
                "std": _of_channels(config.dataset.std),
            },
            "classes": data.num_classes,
        }


def _of_channels(values: Sequence[float]) -> list[float]:
    """Return one value for each of the three channels; a single value (greyscale) is repeated."""
    return [*values] * (3 // len(values))


def _changed(config: Config) -> bool:
    """Return whether the config sets options that some of this package's own networks do not support."""
    drop_path = config.stage.drop_path if config.training else None
    return (config.model.stride_in, config.model.bn_eps, drop_path) != ("3x3", None, None)
