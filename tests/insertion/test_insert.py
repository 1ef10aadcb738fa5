import copy
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils import prune  # noqa: F401  # makes nn.utils.prune

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
from qat_runner.insertion.insert import QuantizationWarning, quantizers_disabled, weights_together
from qat_runner.quant import Quantizer, fake_quantize, octav

VISION = ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"]


class Small(nn.Module):
    """A network of conv - ReLU - conv - hardswish - conv - ReLU - pool - linear - linear."""

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
    for layer, before in zip(model.modules(), full.modules(), strict=True):
        assert vars(layer).keys() == vars(before).keys()


def test_bits_granularity_and_gradients_of_the_paper() -> None:
    model = torchvision.models.resnet18(num_classes=7)
    quantize_model(model, bits=4, example=torch.randn(2, 3, 64, 64))
    q = find(model)
    for name in ("conv1", "fc"):
        assert q[f"{name}.weight"].format.bits == q[f"{name}.input"].format.bits == 8
    assert {q[n].format.bits for n in q if not n.startswith(("conv1.", "fc."))} == {4}
    assert q["layer2.0.downsample.0.weight"].format.bits == 4  # projection shortcuts: at low precision
    assert q["layer1.0.conv1.weight"].s.shape == (64, 1, 1, 1)
    assert q["fc.weight"].s.shape == q["fc.input"].s.shape == q["layer1.0.conv1.input"].s.shape == ()
    assert {q[n].gradient.name for n in q if n.endswith("weight")} == {"mad"}
    assert {q[n].gradient.name for n in q if n.endswith("input")} == {"pwl"}
    assert all(q[n].format.signed for n in q if n.endswith("weight"))
    assert [n for n in q if n.endswith("input") and q[n].format.signed] == ["conv1.input"]


def test_signs_of_mobilenet_v3_come_from_structure() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=7)
    quantize_model(model, example=torch.randn(2, 3, 64, 64))
    q = find(model)
    assert not q["features.1.block.1.fc1.input"].format.signed  # pooled ReLU
    assert not q["features.1.block.1.fc2.input"].format.signed  # ReLU
    assert q[
        "features.4.block.2.fc1.input"
    ].format.signed  # pooled hardswish: may be negative, whatever this batch says
    assert not q["features.4.block.2.fc2.input"].format.signed
    assert q["features.1.block.0.0.input"].format.signed  # hardswish
    assert q["classifier.0.input"].format.signed
    assert q["classifier.3.input"].format.signed


@pytest.mark.parametrize("given", [True, False])
def test_signs_ends_and_summary_with_or_without_an_example(given: bool) -> None:
    model = Small()
    x = torch.rand(2, 3, 8, 8)
    quantize_model(model, bits=4, example=x if given else None)
    if not given:
        assert "?" in summary(model)
        model(x)
    q = find(model)
    signed = {n.removesuffix(".input"): q[n].format.signed for n in q if n.endswith("input")}
    assert signed == {"a": False, "b": False, "c": True, "d": False, "head": True}
    last = "head" if given else "d"  # without an example: in order of registration
    assert {n for n in q if q[n].format.bits == 8} == {"a.weight", "a.input", f"{last}.weight", f"{last}.input"}
    rows = [line.split() for line in summary(model).splitlines()]
    assert rows[0] == ["layer", "tensor", "bits", "signed", "granularity", "scalars", "elements"]
    assert ["b", "weight", "4", "yes", "channel", "dynamic", "72"] in rows
    assert ["b", "input", "4", "no", "tensor", "dynamic", "512"] in rows


def test_parameters_beside_layers_are_named_as_such() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.gamma = nn.Linear(8, 8), nn.LayerNorm(8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.fc(self.norm(x))

    class Net(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.pos, self.scale = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.tensor(1.0))
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x * self.scale + self.pos)

    for blocks, text in (
        (1, "gamma of Block blocks.0, LayerNorm blocks.0.norm"),
        (2, "gamma of 2 Block, 2 LayerNorm"),
    ):
        model = quantize_model(Net(blocks), 4, example=torch.randn(2, 8))
        assert summary(model).endswith(f"in full precision: pos and scale of Net, {text}")


def test_the_example_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model[1].eval()
    x = torch.randn(2, 3, 8, 8)
    quantize_model(model, example=x)
    assert model.training
    assert not model[1].training
    assert model[1].num_batches_tracked == 0
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
    """A convolution that multiplies twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_what_is_passed_over_is_named() -> None:
    (twice, unused) = warned(Twice(), torch.randn(1, 3, 8, 8))
    assert "conv is called 2 times" in twice
    assert "unused is not called" in unused
    conv, matmul = warned(Functional(), torch.randn(1, 3, 8, 8))
    assert "convolution in the model itself" in conv
    assert "mm in the model itself" in matmul
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
    """A module that calls a complex layer on a complex version of its input."""

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
    with pytest.raises(ValueError, match="has no layer to quantize"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="already has quantizers"):
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
        assert type(model.a) is nn.Conv2d  # no partial conversion


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
    before = q["c.input"].s.clone()
    model(torch.randn(4, 3, 8, 8) * 10)
    assert torch.equal(q["c.input"].s, before)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])


def sign_of(function: Any) -> bool:
    """Return whether the input of a layer is found to be signed, if it is `function` of the output of a ReLU."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(function(F.relu(x)))
            return out

    model = quantize_model(Model(), example=torch.randn(2, 3, 8, 8))
    return find(model)["layer.input"].format.signed


def negate_a_view(y: Tensor) -> Tensor:
    y[:, :1].neg_()
    return y


def set_some(y: Tensor) -> Tensor:
    y[y > 1] = -1.0
    return y


@pytest.mark.parametrize(
    ("function", "signed"),
    [
        (lambda y: y, False),
        (lambda y: F.max_pool2d(y, 2), False),
        (lambda y: y + y.mean((2, 3), keepdim=True), False),
        (lambda y: y * 0.5 + 1, False),
        (lambda y: y.type(torch.float64).float(), False),
        (lambda y: torch.cat([y[:, :1], y[:, 1:]], 1), False),
        (lambda y: F.dropout(y, 0.1), False),
        (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), False),
        (lambda y: F.pad(y, (1, 1, 1, 1)), False),
        (lambda y: y.clamp(0, 6), False),
        (lambda y: F.hardtanh(y, 0.0, 6.0), False),
        (lambda y: y - 1, True),
        (lambda y: y * -1, True),
        (lambda y: torch.add(y, y, alpha=-2), True),
        (lambda y: F.interpolate(y, scale_factor=2, mode="bicubic"), True),
        (lambda y: F.pad(y, (1, 1, 1, 1), value=-1.0), True),
        (lambda y: F.hardswish(y), True),
        (lambda y: F.batch_norm(y, None, None, training=True), True),
        (negate_a_view, True),
        (set_some, True),
    ],
)
def test_signs_follow_structure(function: Any, signed: bool) -> None:
    assert sign_of(function) is signed


class Otherwise(nn.Module):
    """A network that gives its second layer a different input in training."""

    def __init__(self, trained: Any) -> None:
        super().__init__()
        self.a, self.b, self.trained = nn.Linear(6, 6), nn.Linear(6, 4), trained

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(self.trained(y) if self.training else y)


@pytest.mark.parametrize(
    ("trained", "signed"),
    [
        (lambda y: y - 1, True),
        (lambda y: torch.cat([y, y])[:2], False),
        (lambda y: y * torch.empty(2, 1).bernoulli_(0.5).div_(0.5), False),  # as stochastic depth does
        (lambda y: y.div(0.5) * (0.5 + torch.rand(2, 1)).floor_(), False),  # likewise, in transformers
        (lambda y: (torch.rand_like(y) > 0.5) * y, False),
        (lambda y: torchvision.ops.DropBlock2d(0.5, 1)(y.view(2, 1, 2, 3)).view(2, 6), False),
    ],
)
def test_signs_are_those_of_training_as_well(trained: Any, signed: bool) -> None:
    model = quantize_model(Otherwise(trained), example=torch.randn(2, 6))
    assert find(model)["b.input"].format.signed is signed
    assert {t.name: t.elements for t in quantized_tensors(model)}["b.input"] == 6


def test_copies_of_an_undecided_model_decide_for_themselves() -> None:
    x = torch.rand(2, 3, 8, 8)
    model = quantize_model(Small())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin(x)
    assert not find(twin)["a.input"].format.signed
    assert "?" in summary(model)
    assert not twin._forward_pre_hooks
    remove_quantizers(model)
    assert not model._forward_pre_hooks
    quantize_model(model, example=x)
    assert "?" not in summary(model)


def test_a_first_batch_that_fails_is_none() -> None:
    model, x = quantize_model(Small()), torch.rand(2, 3, 8, 8)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert "?" in summary(model)
    model(x)
    assert "?" not in summary(model) and not find(model)["a.input"].format.signed
    assert not model._forward_pre_hooks


class Reshaped(nn.Module):
    """A network that reshapes its input, and has an input that cannot be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1) * 2).relu())


def told(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


NEGATIVE = "a.input: is given negative values, which are clipped to 0"


@pytest.mark.parametrize("training", [True, False])
def test_a_made_up_example_without_negative_values(training: bool) -> None:
    model, x = quantize_model(Reshaped(), example=torch.rand(2, 2, 3)), torch.randn(8, 2, 3)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))).train(training)
    assert [q.format.signed for n, q in find(model).items() if n.endswith("input")] == [False, False]
    assert not told(lambda: model(torch.rand(2, 2, 3)))
    (message,) = told(lambda: model.eval()(x))
    assert message.startswith(NEGATIVE)
    assert not told(lambda: (model(x), model.train()(x)))  # once
    assert not told(lambda: quantize_model(Reshaped(), example=x).train()(x))


def test_negative_values_are_told_in_training_and_in_calibration() -> None:
    x = torch.randn(8, 2, 3)
    model = quantize_model(Reshaped(), example=torch.zeros(2, 2, 3))
    (message,) = told(lambda: model.train()(x))
    assert message.startswith(NEGATIVE)
    static = quantize_model(Reshaped(), example=torch.zeros(2, 2, 3), dynamic=False)
    (message,) = told(lambda: calibrate(static, [x]))
    assert message.startswith(NEGATIVE)
    compiled = quantize_model(Reshaped(), example=torch.zeros(2, 2, 3))
    assert not told(lambda: torch.compile(compiled, backend="eager", fullgraph=True)(x))


def test_the_sign_travels_with_the_state() -> None:
    model = quantize_model(Small(), example=torch.rand(2, 3, 8, 8), dynamic=False)
    calibrate(model, [torch.rand(2, 3, 8, 8)])
    other = quantize_model(Small(), example=torch.randn(2, 3, 8, 8), dynamic=False)
    assert find(other)["a.input"].format.signed
    other.load_state_dict(model.state_dict())
    assert not find(other)["a.input"].format.signed
    eight = quantize_model(Small(), bits=8, example=torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="the saved scalars are for 4 bits, not for 8 bits"):
        eight.load_state_dict(model.state_dict())


def test_the_same_tensor_twice_and_keywords() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(input=a) + b

    y = torch.randn(3, 4)
    assert find(quantize_model(Two(), example=(y, y)))["layer.input"].format.signed
    model = quantize_model(Two())
    model(a=y.abs(), b=y)
    assert not find(model)["layer.input"].format.signed


@pytest.mark.filterwarnings("ignore:.*is not quantized.*", "ignore:.*left as it is", "ignore:.*is not called")
def test_transformers_do_not_bypass_quantizers_in_eval() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        full = layer(x)
        quantize_model(layer, bits=2, first_last_bits=2, example=x)
        assert not torch.allclose(layer(x), full, atol=1e-2)
        remove_quantizers(layer)
        assert torch.allclose(layer(x), full)


def test_pruned_and_parametrized_layers() -> None:
    layer = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    model = quantize_model(nn.Sequential(layer), example=torch.randn(2, 4))
    assert (layer(torch.randn(2, 4))).shape == (2, 4)
    assert "weight" in summary(model)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(normed)
    x = torch.randn(2, 4)
    plain = model(x)
    quantize_model(model, bits=2, first_last_bits=2, example=x)
    assert {t.tensor for t in quantized_tensors(model)} == {"weight", "input"}
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    copy.deepcopy(model)(x)
    assert torch.equal(remove_quantizers(model)(x), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use what PyTorch deprecates
def test_a_quantized_model_compiles_in_one_graph() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = quantize_model(Small(), bits=4, example=x, iterations=2).eval()  # a loop that is compiled unrolled
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_compiles_once_and_for_all() -> None:
    """Training compiles once without scalars to start from and once with them; no later step compiles again."""
    model = quantize_model(nn.Sequential(nn.Linear(8, 4)), 4, example=torch.randn(2, 8))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(4):
        compiled(torch.randn(4, 8)).square().mean().backward()
    assert counter.frame_count == 2
    assert all(t.quantizer.batches == 4 for t in quantized_tensors(model))


def test_weights_quantized_once() -> None:
    """With one quantization of each weight for both parts of a batch, the gradients are the same as with two."""
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))

    def gradients(once: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model = quantize_model(Small(), 4, example=x, warm_iterations=None)
        weights = [t.quantizer for t in quantized_tensors(model) if t.tensor == "weight"]
        with weights_together(model).quantized(2) if once else nullcontext():
            for part in (slice(0, 3), slice(3, 8)):
                nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
        calls = int(sum(q.batches for q in weights))
        assert calls == len(weights) * (1 if once else 2)
        assert all(q._reused is None and not q._reusing for q in weights)
        return [p.grad for p in model.parameters() if p.grad is not None], calls

    for a, b in zip(gradients(True)[0], gradients(False)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_weights_quantized_once_lets_go_after_an_error() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = quantize_model(Small(), 4, example=x)
    with pytest.raises(RuntimeError), weights_together(model).quantized(2):
        model(x[:, :2])  # the first layer has already quantized its weight
    assert all(t.quantizer._reused is None for t in quantized_tensors(model))


@pytest.mark.parametrize("given", [True, False])
def test_the_head_is_quantized_or_not(given: bool) -> None:
    x = torch.rand(2, 3, 8, 8)
    model = quantize_model(Small(), bits=4, quantize_head=False, example=x if given else None)
    last = "head" if given else "d"  # without an example: in order of registration
    assert f"{last}.weight" not in find(model) and f"{last}.input" not in find(model)
    assert f"Linear {last}" in summary(model)
    assert {n for n in find(model) if find(model)[n].format.bits == 8} == {"a.weight", "a.input"}
    convolutions = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3)), quantize_head=False)
    assert {t.layer for t in quantized_tensors(convolutions)} == {"0"}


def past_its_class(module: Any) -> Any:
    """Set a forward on the instance, as `module.forward = torch.compile(module.forward)` and hooks of accelerate do."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return module


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), Attending, Own])
def test_a_forward_that_is_set_on_a_module_is_left_alone(make: Any) -> None:
    x = torch.randn(2, 5, 8)
    model = nn.Sequential(nn.Linear(8, 8), past_its_class(make()), nn.Linear(8, 8))
    kind, plain = type(model[1]), model(x)
    notes = warned(model, x)
    assert notes[0].startswith("1 has a forward that was set on the instance and bypasses its class: ")
    assert type(model[1]) is kind and {t.layer for t in quantized_tensors(model)} <= {"0", "1.qkv", "2"}
    assert all(t.quantizer.decided for t in quantized_tensors(model)) and "100 %" not in summary(model)
    assert torch.equal(remove_quantizers(model)(x), plain)


def test_a_fast_path_that_a_set_forward_leaves_open_is_told_of() -> None:
    model = past_its_class(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    (note,) = warned(model, torch.randn(2, 5, 8))
    assert "has a forward that was set on the instance and bypasses its class: in eval() PyTorch's fast path" in note


class Calls(nn.Module):
    """A network that calls the forward of a layer directly, not the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a.forward(x).relu())


@pytest.mark.filterwarnings("ignore:addmm in the model itself")  # products in the module around them
@pytest.mark.parametrize("given", [True, False])
def test_layers_whose_forward_is_called_past_them(given: bool) -> None:
    x = torch.randn(4, 8)
    model = quantize_model(Calls(), example=x if given else None)
    model(x)
    signed = {name: q.format.signed for name, q in find(model).items()}
    assert signed == {"a.weight": True, "a.input": True, "b.weight": True, "b.input": False}
    assert all(q.has_scalars for q in find(model).values())


def test_a_quantized_layer_that_does_not_ask_its_quantizers_is_named() -> None:
    model, x = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))), torch.randn(4, 8)
    layer: Any = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)
    with pytest.warns(QuantizationWarning, match="^0 is called, but does not call its quantizers: nothing in it"):
        model(x)


class Writing(nn.Module):
    """A module that writes to its input, and changes its buffers even in eval mode."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x.div_(2)
        self.seen = self.seen * 0.5 + x.mean(0)
        return self.layer(x + self.seen)


@pytest.mark.parametrize("given", [True, False])
def test_a_network_that_writes_to_its_input(given: bool) -> None:
    x = torch.ones(4, 8)
    model: Any = quantize_model(Writing(), example=x if given else None)
    assert not model.seen.any() and torch.equal(x, torch.ones(4, 8))
    model(x)
    assert torch.equal(x, torch.full((4, 8), 0.5)) and torch.equal(model.seen, torch.full((8,), 0.5))
    assert all(t.quantizer.decided for t in quantized_tensors(model))
