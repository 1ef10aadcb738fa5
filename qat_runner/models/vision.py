"""The vision models by name.

These are torchvision's networks, optionally with a stem for small images, the CIFAR ResNets, and networks of other
libraries as published.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from qat_runner.models.cifar_resnet import CifarResNet
from qat_runner.models.libraries import library_of
from qat_runner.models.libraries.base import cannot_drop
from qat_runner.plugins import Registry

STEMS = ("auto", "imagenet", "small")
"""imagenet: as published. small: the first strides are 1, and no max pooling follows the first convolution. auto: by
image size."""

SMALL_IMAGE = 64
"""With stem=auto, images with fewer pixels per side get the small stem."""


def _published(name: str, **config: Any) -> Any:
    """Build a network of torchvision."""
    from torchvision.models import get_model  # deferred: the import takes a second

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
        if small:  # published weights still fit, because the shapes of weights do not depend on strides
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
"""The models of torchvision, which have published weights."""

Builder = Callable[[int, bool, float], nn.Module]
"""Maps (number of classes, small stem, width) to a model"""


class _Models(Registry[Builder]):
    """The registry of models. It also contains the names of networks of other libraries, but does not list them."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and library_of(name) is not None)


MODELS: Registry[Builder] = _Models(
    "model",
    "qat_runner.models",
    {
        **{name: _resnet(name) for name in TORCHVISION_MODELS if name.startswith("resnet")},
        **{name: _mobilenet(name) for name in TORCHVISION_MODELS if name.startswith("mobilenet")},
        **{f"resnet{depth}": _cifar_resnet(depth) for depth in (8, 20, 32, 44, 56)},
    },
    valid=callable,
)
"""The builders by name. The models map images [N, 3, H, W] to logits [N, classes]."""


STRIDES_IN = ("3x3", "1x1")
"""Convolutions that may have the stride of a bottleneck: the second, as in torchvision, or the first, as published."""


def build_model(
    name: str,
    num_classes: int,
    image_size: int,
    stem: str = "auto",
    width: float = 1.0,
    *,
    stride_in: str = "3x3",
    bn_eps: float | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Build a model with weights initialized from torch's global random state.

    Args:
        name: a key of MODELS, or the name of a network of another library.
        num_classes: number of logits.
        image_size: side length, in pixels, of the images that the model is for.
        stem: auto (by image_size), imagenet or small; the CIFAR ResNets have only one stem.
        width: number of channels of a MobileNet, as a multiple of the published number; no effect on ResNets.
        stride_in: one of STRIDES_IN.
        bn_eps: epsilon of every BatchNorm; None: as defined by the network.
        drop_path: as in `Library.build`.

    Raises:
        ValueError: the name or stem is unknown, or the network does not support an option.
    """
    if name not in MODELS:
        raise ValueError(f"model={name}: must be one of {', '.join(MODELS)}")
    if stem not in STEMS:
        raise ValueError(f"model.stem={stem}: must be one of {', '.join(STEMS)}")
    if (found := library_of(name)) is not None:
        library, own = found
        if stem == "small" or width != 1:
            raise ValueError("networks of other libraries do not support model.stem=small or model.width")
        model = library.build(own, num_classes, image_size, drop_path)
    else:
        if drop_path:
            raise cannot_drop(name)
        model = MODELS[name](num_classes, stem == "small" or (stem == "auto" and image_size < SMALL_IMAGE), width)
    if stride_in == "1x1":
        _stride_in_first(model, name)
    if bn_eps is not None:
        _set_bn_eps(model, bn_eps, name)
    return model


def _stride_in_first(model: nn.Module, name: str) -> None:
    """Move the strides of bottlenecks from their 3x3 to their first 1x1 convolution; the weights still fit."""
    found = False
    for block in model.modules():
        first, second = (getattr(block, f"conv{i}", None) for i in (1, 2))
        if not (isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d) and first.kernel_size == (1, 1)):
            continue
        found = True
        first.stride, second.stride = second.stride, first.stride
    if not found:
        raise ValueError(f"model.stride_in=1x1: {name} has no bottlenecks with conv1 of 1x1 and conv2 of 3x3")


def _set_bn_eps(model: nn.Module, eps: float, name: str) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError(f"model.bn_eps={eps:g}: {name} has no BatchNorm")
    for norm in norms:
        norm.eps = eps
