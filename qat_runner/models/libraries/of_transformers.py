"""hf/FOLDER or hf/NAME: what transformers has for classifying images, from a folder or the Hugging Face hub."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.errors import ConfigError
from qat_runner.models.hub import ask
from qat_runner.models.libraries.base import Library, Preprocessing, cannot_drop, interpolation, resized

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers"""


class Transformers(Library):
    prefix = "hf"

    def names(self) -> Sequence[str]:
        return ()

    def check(self, name: str) -> None:
        """Raises:
        ConfigError: there is no such checkpoint, or it is for something else than images and their classes.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

        kind = _config(name).model_type
        if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            raise ConfigError(f"model=hf/{name}: is a {kind}, which transformers has no image classifier for")

    def build(self, name: str, num_classes: int, image_size: int, drop_path: float | None) -> nn.Module:
        from transformers import AutoModelForImageClassification

        config = _config(name)
        config.num_labels = num_classes
        if isinstance(getattr(config, "image_size", None), int):
            config.image_size = image_size
        if drop_path is not None and hasattr(config, "drop_path_rate"):
            config.drop_path_rate = drop_path
        elif drop_path:
            raise cannot_drop(f"hf/{name}")
        build: Any = AutoModelForImageClassification.from_config
        model: nn.Module = build(config, trust_remote_code=False)
        return model

    def has_weights(self, name: str) -> bool:
        return True

    def published(self, name: str, image_size: int) -> tuple[str, dict[str, Tensor]]:
        from transformers import AutoModelForImageClassification

        load = functools.partial(
            AutoModelForImageClassification.from_pretrained, output_loading_info=True, dtype=torch.float32
        )
        model, info = _ask(name, load)
        return name, {key: t for key, t in model.state_dict().items() if key not in info["missing_keys"]}

    def preprocessing(self, name: str) -> Preprocessing:
        from transformers.image_processing_base import ImageProcessingMixin

        described, _ = _ask(name, ImageProcessingMixin.get_image_processor_dict)
        shown, resize = _sides(described)
        mean, std = (tuple(described.get(key) or ()) for key in ("image_mean", "image_std"))
        if not described.get("do_normalize", True):
            mean, std = (0.0,), (1.0,)
        if not (shown and mean and std):
            raise ConfigError(f"model=hf/{name}: its preprocessor_config.json does not say size, mean and deviation")
        return Preprocessing(
            shown, max(resize, shown), mean, std, interpolation(_RESAMPLING.get(described.get("resample", 2), ""))
        )


WHOLE = 384
"""Pixels a side from which on ConvNeXt's image processor crops nothing."""


def _sides(described: dict[str, Any]) -> tuple[int, int]:
    """Pixels a side of what a network is shown, and of the shorter side of the picture that this is the centre of, as
    the image processors of transformers have them; 0 where it is not said."""
    size, crop = (_side(described.get(key)) for key in ("size", "crop_size"))
    kind = str(described.get("image_processor_type") or described.get("feature_extractor_type"))
    ratio = described.get("crop_pct") or 1
    if not described.get("do_center_crop"):  # ConvNeXt's size is that of the crop
        return size, resized(size, ratio if size < WHOLE else 1)
    if kind.startswith("Perceiver"):  # crops before it resizes: size / crop_size of the shorter side
        return size, crop
    if kind.startswith("Levit") and not (isinstance(described.get("size"), dict) and "height" in described["size"]):
        ratio = 224 / 256  # that it was published with
    return crop or size, resized(size or crop, ratio)


def _side(size: Any) -> int:
    """Pixels a side of what an image processor calls a size; 0 where it says none."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else 0


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return _ask(name, AutoConfig.from_pretrained)


def _ask(name: str, load: Any) -> Any:
    return ask(name, load, "a network for images", f"model=hf/{name}")
