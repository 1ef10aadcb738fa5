import copy
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.insertion import (
    QuantConv2d,
    QuantLinear,
    calibrate,
    full_precision_state_dict,
    quantize_model,
    quantized_tensors,
    remove_quantizers,
    summary,
)
from qat_runner.insertion.insert import QuantizationWarning, quantizers_disabled
from qat_runner.quant import Quantizer, fake_quantize, octav

VISION = ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"]


class Small(nn.Module):
    """conv - ReLU - conv - hardswish - conv - ReLU - pool - linear - linear"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)  # registered first, called last
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 8, 1)
        self.d = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.hardswish(self.b(x))
        x = F.relu(self.c(x))
        return self.head(self.d(x.mean((2, 3))))


def find(model: nn.Module) -> dict[str, Quantizer]:
    return {t.name: t.quantizer for t in quantized_tensors(model)}


@pytest.mark.parametrize("name", VISION)
def test_torchvision_models_keep_class_names_and_state(name: str) -> None:
    full = torchvision.models.get_model(name, num_classes=7).eval()
    model = copy.deepcopy(full)
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    x = torch.randn(2, 3, 64, 64)
    assert quantize_model(model, bits=4, example=x) is model
    assert type(model) is type(full)
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    convolutions = sum(type(m) is nn.Conv2d for m in full.modules())
    linears = sum(type(m) is nn.Linear for m in full.modules())
    assert len(quantized_tensors(model)) == 2 * (convolutions + linears)
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())

    model.load_state_dict(full.state_dict())  # full precision -> quantized, strictly
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    full.load_state_dict(full_precision_state_dict(model))  # quantized -> full precision, strictly
    model.eval()
    full.eval()
    with quantizers_disabled(model):
        assert torch.equal(model(x), full(x))
    assert not torch.equal(model(x), full(x))
    assert torch.equal(remove_quantizers(model)(x), full(x))
    assert list(model.state_dict()) == list(full.state_dict())


def test_bits_granularity_and_gradients_of_the_paper() -> None:
    model = torchvision.models.resnet18(num_classes=7)
    quantize_model(model, bits=4, example=torch.randn(2, 3, 64, 64))
    q = find(model)
    for name in ("conv1", "fc"):
        assert q[f"{name}.weight"].bits == q[f"{name}.input"].bits == 8
    assert {q[n].bits for n in q if not n.startswith(("conv1.", "fc."))} == {4}
    assert q["layer2.0.downsample.0.weight"].bits == 4  # projection shortcuts: at the low precision
    assert q["layer1.0.conv1.weight"].s.shape == (64, 1, 1, 1)
    assert q["fc.weight"].s.shape == q["fc.input"].s.shape == q["layer1.0.conv1.input"].s.shape == ()
    assert {q[n].gradient for n in q if n.endswith("weight")} == {"mad"}
    assert {q[n].gradient for n in q if n.endswith("input")} == {"pwl"}
    assert all(q[n].signed for n in q if n.endswith("weight"))
    assert [n for n in q if n.endswith("input") and q[n].signed] == ["conv1.input"]


def test_signs_of_mobilenet_v3_come_from_structure() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=7)
    quantize_model(model, example=torch.randn(2, 3, 64, 64))
    q = find(model)
    assert not q["features.1.block.1.fc1.input"].signed  # pooled ReLU
    assert not q["features.1.block.1.fc2.input"].signed  # ReLU
    assert q["features.4.block.2.fc1.input"].signed  # pooled hardswish: may be negative, whatever this batch says
    assert not q["features.4.block.2.fc2.input"].signed
    assert q["features.1.block.0.0.input"].signed  # hardswish
    assert q["classifier.0.input"].signed
    assert q["classifier.3.input"].signed


@pytest.mark.parametrize("given", [True, False])
def test_signs_ends_and_summary_with_or_without_an_example(given: bool) -> None:
    model = Small()
    x = torch.rand(2, 3, 8, 8)
    quantize_model(model, bits=4, example=x if given else None)
    if not given:
        assert "?" in summary(model)
        model(x)
    q = find(model)
    signed = {n.removesuffix(".input"): q[n].signed for n in q if n.endswith("input")}
    assert signed == {"a": False, "b": False, "c": True, "d": False, "head": True}
    last = "head" if given else "d"  # without an example: in order of registration
    assert {n for n in q if q[n].bits == 8} == {"a.weight", "a.input", f"{last}.weight", f"{last}.input"}
    rows = [line.split() for line in summary(model).splitlines()]
    assert rows[0] == ["layer", "tensor", "bits", "signed", "granularity", "elements"]
    assert ["b", "weight", "4", "yes", "channel", "72"] in rows
    assert ["b", "input", "4", "no", "tensor", "512"] in rows


def test_the_example_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model[1].eval()
    x = torch.randn(2, 3, 8, 8)
    quantize_model(model, example=x)
    assert model.training
    assert not model[1].training
    assert model[1].num_batches_tracked == 0
    assert not hasattr(x, "_cannot_be_negative")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_forward_is_what_it_says() -> None:
    layer = nn.Linear(6, 4)
    quantize_model(
        nn.Sequential(layer), bits=3, first_last_bits=3, linear_granularity="channel", example=torch.randn(2, 6)
    )
    assert isinstance(layer, QuantLinear)
    x = torch.randn(5, 6)
    w = layer.weight
    by_hand = F.linear(fake_quantize(x, octav(x, 3), 3), fake_quantize(w, octav(w, 3, dim=0), 3), layer.bias)
    assert torch.equal(layer(x), by_hand)
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    quantize_model(nn.Sequential(conv), bits=32, weight_bits=4, first_last_bits=4, example=torch.randn(1, 4, 6, 6))
    assert isinstance(conv, QuantConv2d)
    x = torch.randn(1, 4, 6, 6)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    w = conv.weight
    torch.testing.assert_close(conv(x), F.conv2d(padded, fake_quantize(w, octav(w, 4, dim=0), 4), conv.bias))


def test_full_precision_kinds() -> None:
    model = quantize_model(Small(), bits=32)
    assert quantized_tensors(model) == []
    assert type(model.a) is nn.Conv2d
    weights_only = quantize_model(Small(), bits=32, weight_bits=4, example=torch.randn(1, 3, 8, 8))
    assert {t.tensor for t in quantized_tensors(weights_only)} == {"weight"}


def warned(model: nn.Module, *example: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model(model, example=example, **options)
    assert all(w.category is QuantizationWarning for w in caught)
    return [str(w.message) for w in caught]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.up = nn.ConvTranspose2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.conv(x), self.weight)
        return self.up(y) @ torch.ones(y.shape[-1] + 1, 2)


class OwnConv(nn.Conv2d):
    pass


def test_what_is_passed_over_is_named() -> None:
    (twice, unused) = warned(Twice(), torch.randn(1, 3, 8, 8))
    assert "conv is called 2 times" in twice
    assert "unused is not called" in unused
    conv, up, matmul = warned(Functional(), torch.randn(1, 3, 8, 8))
    assert "conv2d called in the model itself" in conv
    assert "conv_transpose2d called in up (ConvTranspose2d)" in up
    assert "matmul" in matmul
    (own,) = warned(nn.Sequential(nn.Conv2d(3, 3, 1), OwnConv(3, 3, 1)), torch.randn(1, 3, 8, 8))[:1]
    assert "1 is a OwnConv" in own
    assert warned(Small(), torch.randn(1, 3, 8, 8)) == []


def test_odd_dtypes() -> None:
    double = Small().double()
    assert warned(double, torch.randn(1, 3, 8, 8, dtype=torch.float64)) == []
    assert double(torch.randn(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    complex_ = nn.Linear(3, 3, dtype=torch.complex64)
    (note, *_) = warned(nn.Sequential(nn.Linear(3, 3), Sink(complex_)), torch.randn(2, 3))
    assert "torch.complex64" in note


class Sink(nn.Module):
    """Calls a complex layer on a complex version of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.complex(x, x)).abs()


def test_layers_keep_their_identity_and_aliases() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    calls = []
    conv.register_forward_hook(lambda m, a, o: calls.append(1))
    with pytest.warns(QuantizationWarning, match="2 times"):
        quantize_model(model, example=torch.randn(1, 3, 4, 4))
    assert model[0] is model[2] is conv
    calls.clear()
    model(torch.randn(1, 3, 4, 4))
    assert len(calls) == 2
    assert len(quantized_tensors(model)) == 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"has no nn\.Conv2d or nn\.Linear"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="holds quantizers already"):
        quantize_model(quantize_model(Small()))
    for options, message in (
        ({"bits": 1}, "bits=1"),
        ({"gradient": "pwm"}, "gradient='pwm'"),
        ({"clipping": "best"}, "clipping='best'"),
        ({"conv_granularity": "row"}, "conv_granularity='row'"),
        ({"clipping": "percentile", "q": -1.0}, "q=-1"),
    ):
        model = Small()
        with pytest.raises(ValueError, match=message):
            quantize_model(model, **options)  # type: ignore[arg-type]
        assert type(model.a) is nn.Conv2d  # nothing half done


def test_deepcopy_and_to() -> None:
    model = quantize_model(Small(), example=torch.randn(1, 3, 8, 8))
    twin = copy.deepcopy(model).to(torch.float64)
    assert twin(torch.randn(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert model.a.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_calibration_is_the_mean_of_full_precision_batches() -> None:
    model = Small()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    inputs = []
    handle = model.c.register_forward_pre_hook(lambda m, a: inputs.append(a[0].clone()))
    model.eval()
    for x in batches:
        model(x)
    handle.remove()
    model.train()
    quantize_model(model, bits=4, dynamic=False, example=batches[0])
    assert calibrate(model, batches) == 3
    assert model.training
    q = find(model)
    torch.testing.assert_close(q["c.input"].s, torch.stack([octav(x, 4) for x in inputs]).mean())
    torch.testing.assert_close(q["c.weight"].s, octav(model.c.weight, 4, dim=0))
    held = q["c.input"].s.clone()
    model(torch.randn(4, 3, 8, 8) * 10)
    assert torch.equal(q["c.input"].s, held)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
