"""Networks of torchvision: torchvision/NAME, its classification networks as published."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qat_runner.errors import ConfigError
from qat_runner.models.libraries.base import Library, Preprocessing, cannot_drop, interpolation


class Torchvision(Library):
    prefix = "torchvision"

    def names(self) -> Sequence[str]:
        from torchvision import models  # deferred: the import takes a second

        names: Sequence[str] = models.list_models(module=models)
        return names

    def build(self, name: str, num_classes: int, image_size: int, drop_path: float | None) -> nn.Module:
        from torchvision.models import get_model

        options: dict[str, Any] = {}
        if name.startswith("vit_"):
            options["image_size"] = image_size
        elif name.startswith("maxvit_"):
            options["input_size"] = (image_size, image_size)
        elif name in ("inception_v3", "googlenet"):
            options["transform_input"] = True  # needed by published weights: their normalization is not ImageNet's
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the initialization of GoogLeNet and Inception
            model: nn.Module = get_model(name, num_classes=num_classes, **options)
        if drop_path is not None:
            _set_drop_path(model, drop_path, name)
        return model

    def has_weights(self, name: str) -> bool:
        from torchvision.models import get_model_weights

        return name in self.names() and len(get_model_weights(name)) > 0

    def published(self, name: str, image_size: int) -> tuple[str, dict[str, Tensor]]:
        weights = _default(name)
        state = dict(weights.get_state_dict(progress=False, check_hash=True))
        if name.startswith("vit_") and image_size not in (0, weights.meta["min_size"][0]):
            from torchvision.models.vision_transformer import interpolate_embeddings

            patch_size = state["conv_proj.weight"].shape[-1]
            state = dict(interpolate_embeddings(image_size, patch_size, OrderedDict(state)))
        return str(weights), state

    def preprocessing(self, name: str) -> Preprocessing:
        described = _default(name).transforms()
        return Preprocessing(
            described.crop_size[0],
            described.resize_size[0],
            tuple(described.mean),
            tuple(described.std),
            interpolation(described.interpolation.value),
        )


def _default(name: str) -> Any:
    """Return the best published weights of a network, a member of its torchvision enum."""
    from torchvision.models import get_model_weights

    published = list(get_model_weights(name))
    if not published:
        raise ConfigError(f"model=torchvision/{name}: has no published weights")
    return get_model_weights(name).DEFAULT


def _set_drop_path(model: nn.Module, rate: float, name: str) -> None:
    """Set drop probabilities that rise linearly from block to block, from 0 up to `rate`."""
    from torchvision.ops import StochasticDepth

    drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if rate > 0 and not drops:
        raise cannot_drop(f"torchvision/{name}")
    for i, drop in enumerate(drops):
        drop.p = rate * i / max(len(drops) - 1, 1)
