import pytest
import torch
from torch import nn

from qat_runner.models import MODELS, build_model
from qat_runner.models.cifar_resnet import CifarResNet


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("size", [8, 32])
def test_every_model_takes_small_images(name: str, size: int) -> None:
    model = build_model(name, num_classes=7, image_size=size)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_stems() -> None:
    published, small = build_model("resnet18", 10, 224), build_model("resnet18", 10, 32)
    assert published.conv1.stride == (2, 2)
    assert isinstance(published.maxpool, nn.MaxPool2d)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.Identity)
    assert build_model("resnet18", 10, 32, "imagenet").conv1.kernel_size == (7, 7)
    strides = [m.stride for m in build_model("mobilenet_v2", 10, 32).modules() if isinstance(m, nn.Conv2d)]
    assert strides.count((2, 2)) == 3


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6)])
def test_cifar_resnets_have_the_published_size(depth: int, parameters: float) -> None:
    """The published numbers are those of table 6 of He et al. 2016."""
    model = CifarResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.0.bn2.bias", "linear.weight"} <= set(model.state_dict())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="model=alexnet"):
        build_model("alexnet", 10, 32)
    with pytest.raises(ValueError, match="stem=big"):
        build_model("resnet18", 10, 32, "big")
    with pytest.raises(ValueError, match="depth=21"):
        CifarResNet(21)
