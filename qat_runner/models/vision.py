"""The vision models by name: torchvision's, with a stem for small pictures where wanted, and the CIFAR ResNets."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from qat_runner.models.cifar_resnet import CifarResNet
from qat_runner.plugins import Registry

STEMS = ("auto", "imagenet", "small")
"""imagenet: the published network. small: the first strides are 1, and no max pooling follows the first convolution."""

SMALL_PICTURE = 64
"""Pictures of fewer pixels a side get the small stem under stem=auto."""


def _published(name: str, **config: Any) -> Any:
    """A network of torchvision's."""
    from torchvision.models import get_model  # which takes a second to import

    return get_model(name, **config)


def _resnet(name: str) -> Callable[[int, bool, float], nn.Module]:
    def build(num_classes: int, small: bool, width: float) -> nn.Module:
        model: Any = _published(name, num_classes=num_classes)
        if small:
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
        return cast(nn.Module, model)

    return build


def _mobilenet(name: str) -> Callable[[int, bool, float], nn.Module]:
    def build(num_classes: int, small: bool, width: float) -> nn.Module:
        model: Any = _published(name, num_classes=num_classes, width_mult=width)
        if small:  # weights do not depend on strides, so published weights still fit
            strided = [m for m in model.features.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
            for conv in strided[:2]:
                conv.stride = (1, 1)
        return cast(nn.Module, model)

    return build


def _cifar_resnet(depth: int) -> Callable[[int, bool, float], nn.Module]:
    return lambda num_classes, small, width: CifarResNet(depth, num_classes)


TORCHVISION_MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
)
"""The models that have published weights."""

MODELS: Registry[Callable[[int, bool, float], nn.Module]] = Registry(
    "model",
    "qat_runner.models",
    {
        **{name: _resnet(name) for name in TORCHVISION_MODELS if name.startswith("resnet")},
        **{name: _mobilenet(name) for name in TORCHVISION_MODELS if name.startswith("mobilenet")},
        **{f"resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 44, 56)},
    },
    valid=callable,
)
"""Name -> (number of classes, small stem, width) -> model, from pictures [N, 3, H, W] to logits [N, classes]."""


def build_model(name: str, num_classes: int, image_size: int, stem: str = "auto", width: float = 1.0) -> nn.Module:
    """A freshly initialized model, by torch's global random state.

    Args:
        name: a key of MODELS.
        num_classes: number of logits.
        image_size: pixels a side of the pictures it is meant for.
        stem: auto (by image_size), imagenet or small; the CIFAR ResNets have one stem only.
        width: channels of a MobileNet, as a multiple of the published ones; without effect on ResNets.

    Raises:
        ValueError: unknown name or stem.
    """
    if name not in MODELS:
        raise ValueError(f"model={name}: must be one of {', '.join(MODELS)}")
    if stem not in STEMS:
        raise ValueError(f"model.stem={stem}: must be one of {', '.join(STEMS)}")
    return MODELS[name](num_classes, stem == "small" or (stem == "auto" and image_size < SMALL_PICTURE), width)
