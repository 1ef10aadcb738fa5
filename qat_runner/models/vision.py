"""The vision models by name: torchvision's, with a stem for small pictures where wanted, the CIFAR ResNets, and those
of other libraries as they are published."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from qat_runner.models.cifar_resnet import CifarResNet
from qat_runner.models.libraries import library_of
from qat_runner.models.libraries.base import cannot_drop
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

Builder = Callable[[int, bool, float], nn.Module]
"""(number of classes, small stem, width) -> model"""


class _Models(Registry[Builder]):
    """With the words for networks of other libraries, which are not listed."""

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
"""Name -> (number of classes, small stem, width) -> model, from pictures [N, 3, H, W] to logits [N, classes]."""


STRIDES_IN = ("3x3", "1x1")
"""Convolutions that may have the stride of a bottleneck: the second, as torchvision's, or the first, as published."""


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
    """A freshly initialized model, by torch's global random state.

    Args:
        name: a key of MODELS, or a word for a network of another library.
        num_classes: number of logits.
        image_size: pixels a side of the pictures it is meant for.
        stem: auto (by image_size), imagenet or small; the CIFAR ResNets have one stem only.
        width: channels of a MobileNet, as a multiple of the published ones; without effect on ResNets.
        stride_in: one of STRIDES_IN.
        bn_eps: what BatchNorm adds to variances; None: as the network has it.
        drop_path: as in `Library.build`.

    Raises:
        ValueError: unknown name or stem; or an option that the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"model={name}: must be one of {', '.join(MODELS)}")
    if stem not in STEMS:
        raise ValueError(f"model.stem={stem}: must be one of {', '.join(STEMS)}")
    if (found := library_of(name)) is not None:
        library, own = found
        if stem == "small" or width != 1:
            raise ValueError("model.stem and model.width are not for networks of other libraries")
        model = library.build(own, num_classes, image_size, drop_path)
    else:
        if drop_path:
            raise cannot_drop(name)
        model = MODELS[name](num_classes, stem == "small" or (stem == "auto" and image_size < SMALL_PICTURE), width)
    if stride_in == "1x1":
        _stride_in_first(model, name)
    if bn_eps is not None:
        _set_bn_eps(model, bn_eps, name)
    return model


def _stride_in_first(model: nn.Module, name: str) -> None:
    """Move the strides of bottlenecks from their 3x3 to their first 1x1 convolution: weights do not depend on them."""
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
