"""Image classifiers of transformers: hf/FOLDER from a folder, or hf/NAME from the Hugging Face hub."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.errors import ConfigError
from qat_runner.models.hub import load_from_checkpoint
from qat_runner.models.libraries.base import Library, Preprocessing, cannot_drop, interpolation, resized

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Interpolations by Pillow's numbers"""


class Transformers(Library):
    prefix = "hf"

    def names(self) -> Sequence[str]:
        return ()

    def check(self, name: str) -> None:
        """Check that a checkpoint exists and is for image classification.

        Raises:
            ConfigError: it does not exist, or is for another task.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

        kind = _config(name).model_type
        if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            raise ConfigError(f"model=hf/{name}: is a {kind}, for which transformers has no image classifier")

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
            raise ConfigError(f"model=hf/{name}: its preprocessor_config.json must contain the size, mean and std")
        return Preprocessing(
            shown, max(resize, shown), mean, std, interpolation(_RESAMPLING.get(described.get("resample", 2), ""))
        )


WHOLE = 384
"""Side length in pixels from which on ConvNeXt's image processor does not crop."""


def _sides(described: dict[str, Any]) -> tuple[int, int]:
    """Return the side length of a network's input, and the shorter side of the image that it is center-cropped from.

    Both are in pixels, and derived in the same way as in the image processors of transformers; 0 means not specified.
    """
    size, crop = (_side(described.get(key)) for key in ("size", "crop_size"))
    kind = str(described.get("image_processor_type") or described.get("feature_extractor_type"))
    ratio = described.get("crop_pct") or 1
    if not described.get("do_center_crop"):  # the size of ConvNeXt is the size of the crop
        return size, resized(size, ratio if size < WHOLE else 1)
    if kind.startswith("Perceiver"):  # crops before resizing, to size / crop_size of the shorter side
        return size, crop
    if kind.startswith("Levit") and not (isinstance(described.get("size"), dict) and "height" in described["size"]):
        ratio = 224 / 256  # the ratio that LeViT was published with
    return crop or size, resized(size or crop, ratio)


def _side(size: Any) -> int:
    """Return the side length in pixels from a size of an image processor; 0 if it is not specified."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else 0


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return _ask(name, AutoConfig.from_pretrained)


def _ask(name: str, load: Any) -> Any:
    return load_from_checkpoint(name, load, "an image classifier", f"model=hf/{name}")
