"""Networks of timm: timm/NAME, or timm/NAME.TAG to select one of several published weights."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qat_runner.errors import ConfigError
from qat_runner.models.libraries.base import Library, Preprocessing, cannot_drop, interpolation, resized


class Timm(Library):
    prefix = "timm"

    def names(self) -> Sequence[str]:
        import timm  # deferred: the import takes a second

        return [*timm.list_models(include_tags=False), *timm.list_models(include_tags=True)]

    def build(self, name: str, num_classes: int, image_size: int, drop_path: float | None) -> nn.Module:
        import timm

        options = _sized(name, image_size) | ({"drop_path_rate": drop_path} if drop_path else {})
        try:
            return timm.create_model(name, num_classes=num_classes, **options)
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                raise
            raise cannot_drop(f"timm/{name}") from error

    def has_weights(self, name: str) -> bool:
        return bool(_described(name).has_weights)

    def published(self, name: str, image_size: int) -> tuple[str, dict[str, Tensor]]:
        import timm

        described = _described(name)
        model = timm.create_model(name, pretrained=True, **_sized(name, image_size))
        return f"{described.architecture}.{described.tag}".rstrip("."), model.state_dict()

    def preprocessing(self, name: str) -> Preprocessing:
        described = _described(name)
        size = described.input_size[-1]
        return Preprocessing(
            size,
            resized(size, described.crop_pct),
            tuple(described.mean),
            tuple(described.std),
            interpolation(described.interpolation),
        )


def _described(name: str) -> Any:
    """Return timm's PretrainedCfg of a network."""
    from timm.models import get_pretrained_cfg

    described = get_pretrained_cfg(name)
    if described is None:
        raise ConfigError(f"model=timm/{name}: timm has no pretrained config for it")
    return described


def _sized(name: str, image_size: int) -> dict[str, Any]:
    """Return the option that sets the image size, for networks with a fixed input size; otherwise an empty dict."""
    from timm.models import get_pretrained_cfg

    described = get_pretrained_cfg(name)
    fixed = described is not None and described.fixed_input_size
    return {"img_size": image_size} if fixed and image_size else {}
