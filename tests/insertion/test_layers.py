"""Tests of layers of all kinds: which weight is quantized, with which scalars, and in whose forward."""

import copy
import io
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import qat_runner as qat
from qat_runner.exporting.formats import read_program
from qat_runner.exporting.verify import OnnxFile
from qat_runner.insertion import (
    QuantConv2d,
    QuantLinear,
    calibrate,
    freeze,
    full_precision_state_dict,
    load,
    not_quantized,
    quantize_model,
    quantized_share,
    quantized_tensors,
    remove_quantizers,
    save,
    summary,
)
from qat_runner.insertion.calls import attention
from qat_runner.insertion.insert import QuantizationWarning, quantizers_disabled, weights_together
from qat_runner.insertion.layers import QuantEmbedding, TakenLayer, kind_of
from qat_runner.insertion.own_products import PROJECTIONS, QuantAttention
from qat_runner.insertion.own_weights import UsingOwnWeights
from qat_runner.insertion.size import shared_weights, size_mb
from qat_runner.policy import Rule
from qat_runner.quant import fake_quantize, octav


class Standardized(nn.Conv2d):
    """A convolution that computes its weight from its parameter, as weight standardization does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.used(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def used(self) -> Tensor:
        rows = self.weight.flatten(1)
        return ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).view_as(self.weight)


class Padding(nn.Conv2d):
    """A convolution that pads its input itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(input=x, weight=self.weight, bias=self.bias, stride=self.stride)


class Transposed(nn.Linear):
    """A linear layer that multiplies by the transpose of its weight, as Falcon's layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), 0),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3), 0),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5), 1),
    "depthwise ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), (2, 4, 5, 5), 0),
    "Conv1D": (lambda: Conv1D(6, 4), (2, 5, 4), 1),
    "Standardized": (lambda: Standardized(4, 6, 3), (2, 4, 5, 5), 0),
    "Transposed": (lambda: Transposed(4, 6), (2, 5, 4), 0),
    "Padding": (lambda: Padding(4, 6, 2), (2, 4, 5, 5), 0),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 2)), (2, 4, 5, 5), 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind(name: str, tmp_path: Path) -> None:
    make, shape, dim = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    twin, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    plain = model(x)
    quantize_model(model, 4, linear_granularity="channel", example=x, first_last_bits=None)
    weight = next(t for t in quantized_tensors(model) if t.tensor == "weight")
    assert weight.quantizer.dim == dim and quantized_share(model) == 1
    with quantizers_disabled(model):
        assert torch.equal(model(x), plain)
    layer: Any = twin[0]
    used = layer.used() if isinstance(layer, Standardized) else layer.weight
    q = fake_quantize(used.detach(), octav(used.detach(), 4, dim=dim), 4)
    with torch.no_grad():  # the same layer with a weight and an input that were quantized by hand
        if isinstance(layer, Standardized):
            expected = F.conv2d(fake_quantize(x, octav(x, 4), 4), q, layer.bias)
        else:
            if name == "weight norm":
                layer = nn.Conv2d(4, 6, 2)
                layer.bias = twin[0].bias
            layer.weight.copy_(q)
            expected = layer(fake_quantize(x, octav(x, 4), 4))
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)
    model.train()
    with weights_together(model).quantized():
        model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    nn.Sequential(make()).load_state_dict(full_precision_state_dict(model))
    save(model, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", nn.Sequential(make())).eval()(x), model(x))
    frozen = freeze(copy.deepcopy(model), batches=[x])
    assert torch.equal(qat.export(frozen, tmp_path / "net.pt2", x)(x), frozen(x))
    torch.testing.assert_close(read_program(tmp_path / "net.pt2")(x)[0], frozen(x))
    if dim == 1:
        qat.export(frozen, tmp_path / "net.onnx", x)
        torch.testing.assert_close(OnnxFile(tmp_path / "net.onnx", fused=False)([x]), frozen(x))
    model.load_state_dict(state)
    assert torch.equal(remove_quantizers(model)(x), plain)
    assert type(model[0]) is type(nn.Sequential(make())[0]) or name == "weight norm"


class Cross(nn.Module):
    """Attention that calls its two products one by one, next to another product."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj, self.product = nn.Linear(8, 24), nn.Linear(8, 8), product

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)  # bypasses the layer, as Swin does
        return self.proj(self.product(self.product(q, k.mT).softmax(-1), v))


class Fused(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.qkv, self.how = nn.Linear(8, 24), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, **self.how)


class OfFunction(nn.Module):
    """Attention that passes the weights of its layers to the function of `nn.MultiheadAttention`, as WavLM does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        none = (None, None, False, 0.0)
        weights = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        attended, _ = F.multi_head_attention_forward(
            *(x, x, x, 8, 2, None, bias, *none, self.out.weight, self.out.bias, self.training),
            need_weights=False,
            use_separate_proj_weight=True,
            **weights,
        )
        return attended.transpose(0, 1)


class Products(nn.Module):
    """Attention without parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.products = nn.Linear(8, 24), Products()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.products(*self.qkv(x).chunk(3, -1))
        return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def einsum(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("bij,bjk->bik", a, b)


def baddbmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(torch.ones(1, 1, 1), a, b)


def baddbmm_of(a: Tensor, b: Tensor) -> Tensor:
    return torch.ones(1, 1, 1).baddbmm(batch1=a, batch2=b)


MASK = torch.rand(5, 5) > 0.5
MASK[2] = False  # attends to nothing
BIAS = torch.randn(5, 5)
ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "@": lambda: Cross(matmul),
    "einsum": lambda: Cross(einsum),
    "bmm": lambda: Cross(torch.bmm),
    "baddbmm": lambda: Cross(baddbmm),
    "baddbmm, as a method": lambda: Cross(baddbmm_of),
    "fused": lambda: Fused(),
    "fused, masked": lambda: Fused(attn_mask=MASK),
    "fused, biased": lambda: Fused(attn_mask=BIAS, scale=0.3),
    "fused, causal": lambda: Fused(is_causal=True),
    "without a parameter": lambda: Around(),
    "a function of torch": lambda: OfFunction(),
    "torch": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    "torch, decoder": lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_every_make(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(ATTENTION[name]()) if "dec" not in name else ATTENTION[name](), torch.randn(2, 5, 8)
    inputs = (x, torch.randn(2, 7, 8)) if "dec" in name else (x,)
    exact = "dec" not in name and isinstance(model[0], Cross)  # which calls the product itself, not PyTorch's fused one
    plain, state = model.eval()(*inputs), copy.deepcopy(model.state_dict())
    quantize_model(model, 8, example=inputs)
    assert quantized_share(model) == 1
    assert sum(t.tensor == "probabilities" for t in quantized_tensors(model)) == 1 + ("dec" in name)
    signs = {t.quantizer.format.signed for t in quantized_tensors(model) if t.tensor == "probabilities"}
    assert signs == {False}
    elements = {t.elements for t in quantized_tensors(model) if t.tensor in ("query", "query_projection.input")}
    assert elements == {5 * 8}  # for one sample: all heads, all steps
    with quantizers_disabled(model):
        off = model(*inputs)
    assert not exact or torch.equal(off, plain)
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-5)
    quantized = model(*inputs)
    assert not torch.equal(quantized, plain) and (quantized - plain).abs().max() < 0.3
    model.train()(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model(*inputs)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(again(*inputs), expected)
        assert torch.equal(remove_quantizers(again)(*inputs), plain)
    save(model, tmp_path / "net.pt")
    other = nn.Sequential(ATTENTION[name]()) if "dec" not in name else ATTENTION[name]()
    assert torch.equal(load(tmp_path / "net.pt", other).eval()(*inputs), expected)
    remove_quantizers(other).load_state_dict(full_precision_state_dict(model))
    assert torch.equal(other(*inputs), plain)
    frozen = freeze(model, batches=[inputs])(*inputs)
    integers = qat.export(model, tmp_path / "net.pt2", inputs)
    torch.testing.assert_close(integers(*inputs), frozen)
    torch.testing.assert_close(read_program(tmp_path / "net.pt2")(*inputs)[0], frozen)
    whole = full_precision_state_dict(model).keys() & integers.state_dict().keys()
    assert not [name for name in whole if "weight" in name and "norm" not in name]  # all of them are codes
    calibrate(model, [inputs])
    assert torch.equal(remove_quantizers(model)(*inputs), plain)
    assert model.state_dict().keys() == state.keys()


def orthogonal(module: nn.Module, name: str) -> nn.Module:
    return nn.utils.parametrizations.orthogonal(module, name, "cayley")  # it multiplies by @


def test_what_the_summary_says_of_attention_of_torch() -> None:
    """The projections of attention quantize `in_proj_weight`, which belongs to the module around them."""
    model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), torch.randn(2, 5, 8)
    quantize_model(model, 4, example=x)
    assert "full precision: in_proj_bias of MultiheadAttention 0.self_attn, 2 LayerNorm, softmax" in summary(model)
    partly = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    quantize_model(partly, 4, rules=[{"match": "*.key_projection.weight", "bits": 32}], example=x)
    assert "in_proj_weight and in_proj_bias of MultiheadAttention 0.self_attn" in summary(partly)


def pruned(module: nn.Module, name: str) -> object:
    return prune.l1_unstructured(module, name, 0.3)


@pytest.mark.filterwarnings("ignore:mm in .*_Orthogonal")
@pytest.mark.parametrize("change", [pruned, nn.utils.parametrizations.weight_norm, orthogonal])
@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_attention_of_torch_whose_weights_are_computed(
    name: str, change: Callable[[Any, str], object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), torch.randn(2, 5, 8)
    place, _, tensor = f"0.self_attn.{name}".rpartition(".")
    change(model.get_submodule(place), tensor)
    plain = model.eval()(x)
    quantize_model(model, 4, first_last_bits=None, example=x)
    tensors = [t for t in quantized_tensors(model) if ".self_attn." in t.name]
    assert len(tensors) == 12  # weight and input of four layers, four operands of products
    stored = [model.get_submodule(t.layer).qat_stored_weight() for t in tensors if t.tensor == "weight"]  # type: ignore[operator]
    assert {id(p) for p in stored} < {id(p) for p in model.parameters()}
    small, full = size_mb(model)
    assert full - small == pytest.approx((28 * (4 * 64 + 2 * 128) - 32 * 16) / 8e6)  # 16 scalars
    with quantizers_disabled(model):
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    calls = [0] * len(tensors)
    for i, t in enumerate(tensors):
        t.quantizer.register_forward_hook(lambda q, args, out, i=i: calls.__setitem__(i, calls[i] + 1))
    model.train()(x).square().sum().backward()
    assert calls == [1] * len(tensors)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if change is not pruned:  # PyTorch cannot copy pruned modules
        frozen = freeze(model, batches=[x]).eval()(x)
        torch.testing.assert_close(qat.export(model, tmp_path / "net.pt2", x)(x), frozen)


@pytest.mark.filterwarnings("ignore:mm in .*_Orthogonal")
def test_what_a_weight_is_computed_by_is_no_product_of_the_layer() -> None:
    torch.manual_seed(0)
    layer, x = orthogonal(Transposed(8, 8), "weight"), torch.randn(3, 8)
    model = quantize_model(nn.Sequential(layer), 4, first_last_bits=None, example=x).eval()
    w = layer.weight.detach()
    by_hand = fake_quantize(x, octav(x, 4), 4) @ fake_quantize(w, octav(w, 4), 4).T + layer.bias
    torch.testing.assert_close(model(x), by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.qat_used_weight(), w)  # type: ignore[operator]


class Renormed(nn.Linear):
    """A layer that keeps the rows of its weight at a fixed norm, in new memory."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(x)


class Clamped(nn.Linear):
    """A layer that keeps its weight small, in place."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.05, 0.05)
        return super().forward(x)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("make", [Renormed, Clamped])
def test_weights_that_are_made_in_the_forward_pass_are_none_that_were_before(
    make: type[nn.Linear], passes: int
) -> None:
    torch.manual_seed(0)
    network, xs = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), make(6, 4)), torch.randn(passes, 5, 6)
    grads = []
    for together in (False, True):
        model = quantize_model(copy.deepcopy(network), 8, first_last_bits=None, example=xs[0])
        model.train()(xs[0])  # scalars start from this batch
        with torch.no_grad():
            for p in model[2].parameters():
                p.mul_(4)
        with weights_together(model).quantized(passes) if together else nullcontext():
            for x in xs:
                model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 4
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)  # a last bit of a scalar may move a code


@pytest.mark.parametrize("mask", [MASK, torch.zeros(5, 5).masked_fill(~MASK, -torch.inf)], ids=["bool", "float"])
def test_gradients_of_a_query_that_looks_at_nothing(mask: Tensor) -> None:
    torch.manual_seed(0)
    model, x = Fused(attn_mask=mask), torch.randn(2, 5, 8)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    quantize_model(model, 8, example=x).zero_grad()
    with quantizers_disabled(model):
        model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_padded_batches_of_torchs_own_encoder() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.arange(5) > torch.tensor([[4], [2]])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
        quantize_model(model, 8, example=x)
        with quantizers_disabled(model):
            off = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(off[~padding], plain[~padding], rtol=1e-4, atol=1e-5)
        assert (model(x, src_key_padding_mask=padding) - plain)[~padding].abs().max() < 0.3


def test_a_module_that_is_no_attention_is_named() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y @ y.mT @ y @ y.mT

    with pytest.warns(QuantizationWarning, match="bmm in the model itself, .* not quantized: only convolution layers"):
        model = quantize_model(Three(), example=torch.randn(2, 5, 8))
    assert [rest.operation for rest in not_quantized(model)] == ["bmm"]


BESIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tensordot": lambda x, w: torch.tensordot(x, 2 * w, ([1], [1])),
    "inner": lambda x, w: torch.inner(x, 2 * w),
    "mv": lambda x, w: torch.mv(w, x[0]),
    "addmm": lambda x, w: torch.zeros(2, 6).addmm(x, w.T),
    "cdist": torch.cdist,
}
"""What a layer may compute in addition to its product, from [2, 4] and [6, 4]."""


@pytest.mark.parametrize("name", BESIDES)
def test_layers_that_multiply_once_more_are_left_alone(name: str) -> None:
    class More(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + BESIDES[name](x, self.weight)

    with pytest.warns(QuantizationWarning, match=r"^0 is a More, which may compute something else than its base"):
        model = quantize_model(nn.Sequential(More(4, 6), nn.Linear(6, 3)), example=torch.randn(2, 4))
    assert {t.layer for t in quantized_tensors(model)} == {"1"} and (quantized_share(model) or 1) < 0.5


class Gated(nn.Linear):
    """A layer that computes its weight from its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.abs().mean(), self.bias)


class Steps(nn.Linear):
    """A layer that only accepts sequences."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, _ = x.shape
        return F.linear(x, self.weight / 2, self.bias)


class Adapted(nn.Linear):
    """A layer that contains layers of its own kind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x))


class Attending(nn.Linear):
    """A layer that contains attention, which is decomposed into products like the layer's own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.attention = Fused()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.attention(x))


class Squeezed(nn.Conv2d):
    """A layer that contains a layer of another kind."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.gate(y.mean((2, 3))).sigmoid()[..., None, None]


@pytest.mark.parametrize("make", [Gated, Steps, Adapted, Attending])
def test_layers_whose_one_product_cannot_be_told_are_left_alone(make: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), make(8, 8), nn.Linear(8, 4)), torch.randn(2, 5, 8)
    plain = model(x)
    with pytest.warns(QuantizationWarning, match=f"^1 is a {make.__name__}, which may compute something else"):
        quantize_model(model, 4, linear_granularity="channel", example=x)
    assert type(model[1]) is make and "1" not in {t.layer for t in quantized_tensors(model)}
    calls: dict[str, int] = {}
    for t in quantized_tensors(model):
        count = lambda q, args, out, name=t.name: calls.update({name: calls.get(name, 0) + 1})  # noqa: E731
        t.quantizer.register_forward_hook(count)
    model.train()(x).square().sum().backward()
    assert calls == {t.name: 1 for t in quantized_tensors(model)}
    weights_together(model), freeze(model, "running")
    assert torch.equal(remove_quantizers(model)(x), plain)


def test_a_layer_with_one_of_another_kind_in_it() -> None:
    model = quantize_model(nn.Sequential(Squeezed()), example=torch.randn(2, 3, 6, 6))
    assert {t.layer for t in quantized_tensors(model)} == {"0", "0.gate"} and quantized_share(model) == 1


class Named(nn.Conv2d):
    """A module that uses common names for its attributes."""

    def __init__(self) -> None:
        super().__init__(3, 8, 1)
        self.channels, self.kind, self.base, self.operands, self.rotation = 8, "same", 1.0, ("a",), nn.Identity()

    def multiply(self, x: Tensor) -> Tensor:
        return x * self.base

    def forward(self, x: Tensor) -> Tensor:
        y = self.rotation(self.multiply(super().forward(x)))
        return y.view(len(y), self.channels, -1).mean(-1)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.full_precision, self.qkv = 10000.0, True, nn.Linear(8, 24)

    def added(self) -> float:
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v) * self.added()


class Based(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.proj = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).relu() @ self.proj


@pytest.mark.parametrize(
    ("make", "shape"), [(Named, (2, 3, 4, 4)), (Rotary, (2, 5, 8)), (Based, (5, 8))], ids=["layer", "attention", "own"]
)
def test_names_that_networks_use_themselves(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x, file = nn.Sequential(make()), torch.randn(shape), io.BytesIO()
    plain = model(x)
    quantize_model(model, 8, example=x).eval()
    expected = model(x)
    assert not torch.equal(expected, plain)
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), expected) and torch.equal(remove_quantizers(again)(x), plain)


MIXED = [TakenLayer, QuantEmbedding, QuantLinear, QuantConv2d, QuantAttention, UsingOwnWeights]


@pytest.mark.parametrize("mixed", MIXED)
def test_what_is_mixed_in_has_names_that_nobody_has(mixed: type[nn.Module]) -> None:
    ours = {name for base in mixed.__mro__ if base.__module__.startswith("qat_runner.") for name in vars(base)}
    assert {name for name in ours if not name.startswith(("__", "qat_", "_qat_"))} == {"forward"}


class Calling(nn.Module):
    """A module that calls layers as attention modules call the products that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.context = nn.Linear(8, 8), nn.Linear(8, 8)
        self.query_projection, self.value_projection = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.value_projection(self.query_projection(self.context(self.scores(x).relu()).relu()).relu())
        return (h @ h.mT).softmax(-1) @ (h @ h.mT) @ h


@pytest.mark.filterwarnings("ignore:bmm in 0 .* is not quantized")
def test_layers_that_are_called_as_products_are_loaded(tmp_path: Path) -> None:
    model, x = quantize_model(nn.Sequential(Calling()), 4, example=torch.randn(2, 5, 8)), torch.randn(2, 5, 8)
    model(x)
    save(model.eval(), tmp_path / "net.pt")
    other = load(tmp_path / "net.pt", nn.Sequential(Calling())).eval()
    assert torch.equal(other(x), model(x)) and type(other[0]) is Calling
    attention = quantize_model(nn.Sequential(Fused()), example=x)
    save(attention, tmp_path / "attention.pt")
    taken = nn.Sequential(Calling())
    layers = dict(taken.named_modules())
    with pytest.raises(ValueError, match="Calling already uses scores or context as an attribute name"):
        load(tmp_path / "attention.pt", taken)
    assert dict(taken.named_modules()) == layers and {type(m) for m in taken[0].children()} == {nn.Linear}


def test_without_an_example_what_is_not_known_stays() -> None:
    with pytest.warns(QuantizationWarning, match="is a Standardized, which may compute something else"):
        model = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 1), Standardized(4, 4, 3), Cross(matmul)))
    assert type(model[1]) is Standardized and type(model[2]) is Cross
    mha = quantize_model(nn.MultiheadAttention(8, 2))
    assert sum(t.tensor == "weight" for t in quantized_tensors(mha)) == 4
    assert {kind_of(mha.get_submodule(name)) for name in PROJECTIONS} == {"Linear"}


def test_attention_that_is_kept_is_what_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Fused()), torch.randn(2, 5, 8)
    plain = model(x)
    quantize_model(model, keep=["1.scores", "1.context"], example=x)
    with quantizers_disabled(model):
        assert torch.equal(model(x), plain)
    quantize_model(remove_quantizers(model), keep=["1.scores", "1.context", "1.qkv"], example=x)
    assert type(model[1]) is Fused and not hasattr(model[1], "scores")


def test_embeddings_where_a_rule_names_them(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))

    x = torch.randint(0, 20, (2, 5))
    assert {t.layer for t in quantized_tensors(quantize_model(network(), example=x))} == {"1"}
    rule = Rule("*", "Embedding", bits=8, granularity="channel")
    model = quantize_model(network(), rules=[rule], example=x)
    (table,) = (t for t in quantized_tensors(model) if t.layer == "0")
    assert (table.tensor, table.quantizer.format.bits, table.quantizer.s.shape) == ("weight", 8, (20, 1))
    weight = model[0].weight.detach()
    model.eval()
    assert torch.allclose(model[0](x), fake_quantize(weight, octav(weight, 8, dim=0), 8)[x])
    integers = qat.export(freeze(model, batches=[x]), tmp_path / "net.pt2", x)
    assert torch.equal(integers(x), model(x)) and integers[0].integer_weight.codes.shape == (20, 8)
    torch.testing.assert_close(read_program(tmp_path / "net.pt2")(x)[0], model(x))


class Head(nn.Module):
    """A module that multiplies by a parameter of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape[::-1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize("head", [partial(nn.Linear, bias=False), Head])
@pytest.mark.parametrize(
    ("rules", "quantized", "bits"),
    [
        ([], {"1", "2"}, 32),  # rows are looked up in full precision
        ([Rule("*", "Embedding", bits=3)], {"0", "1", "2"}, 4),
        ([Rule("*", "Embedding", bits=3), Rule("2*", bits=32)], {"0", "1"}, 32),
    ],
)
def test_a_weight_is_stored_as_it_is_used(
    head: Callable[[int, int], nn.Module], rules: list[Rule], quantized: set[str], bits: int
) -> None:
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 16, bias=False), head(16, 11))
    model[2].weight = model[0].weight
    quantize_model(model, 4, first_last_bits=None, rules=rules, example=torch.zeros(2, 3).long())
    tensors = quantized_tensors(model)
    assert {t.layer.partition(".")[0] for t in tensors if t.tensor == "weight"} == quantized
    assert size_mb(model)[0] * 8e6 == pytest.approx(bits * 11 * 16 + 4 * 16 * 16 + 32 * len(tensors))
    assert {name.partition(".")[0] for name in shared_weights(model)} == quantized - {"1"}


ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "results" / "networks.csv"
NETWORKS = [line.partition(",")[0] for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]]
FAST = [f"transformers/{name}" for name in ("T5EncoderModel", "DebertaV2Model")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAST)
def test_the_zoo(name: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "zoo.py"))
    row = script["visit"](name, script["zoo"]()[name])
    assert (row.quantized, row.steps, row.exported) == (1, "all", "same")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in FAST])
def test_the_whole_zoo(name: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "zoo.py"))
    row = script["visit"](name, script["zoo"]()[name])
    assert row.steps == "all"


def test_the_table_of_the_zoo(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "zoo.py"))
    rows = script["read"](TABLE)
    assert list(rows) == list(script["zoo"]()), "run: python scripts/zoo.py, as docs/results/networks.md says"
    assert {row.steps for row in rows.values()} == {"all"}
    script["write"](tmp_path / "again.csv", list(rows.values()))
    assert script["read"](tmp_path / "again.csv") == rows
    shown = TABLE.with_suffix(".md").read_text(encoding="utf-8")
    assert script["page"](list(rows.values())).splitlines()[-len(rows) :] == shown.splitlines()[-len(rows) :]


@pytest.mark.parametrize(
    ("groups", "outputs", "shape"), [(1, 1, ()), (8, 8, (8, 1, 1, 1)), (2, 2, ()), (1, 3, (1, 3, 1, 1))]
)
def test_scalars_of_transposed_convolutions_are_of_outputs(groups: int, outputs: int, shape: tuple[int, ...]) -> None:
    """Scalars belong to outputs, and to inputs only if each input has its own output.

    With other scalars, products could not be added up as integers.
    """
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, outputs, 2, groups=groups))
    model = quantize_model(layers, 4, example=torch.randn(2, 3, 6, 6), first_last_bits=None)
    scalars = {t.name: tuple(t.quantizer.s.shape) for t in quantized_tensors(model)}
    assert scalars["1.weight"] == shape


def made_of_others() -> list[Callable[[nn.Module], object]]:
    """Return ways to compute a weight from other parameters."""
    new = torch.nn.utils.parametrizations
    return [lambda m: prune.l1_unstructured(m, "weight", 0.5), new.weight_norm, new.spectral_norm]


@pytest.mark.filterwarnings("ignore:.* in 2.parametrizations.weight.0")  # from spectral normalization itself
@pytest.mark.parametrize("make", made_of_others(), ids=["pruning", "weight_norm", "spectral_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_computed_are_looked_at_without_a_change(
    make: Callable[[nn.Module], object], training: bool
) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    make(layers[2])
    x = torch.randn(2, 3, 12, 12)
    model = quantize_model(layers.train(training), 4, example=x)
    assert 0 < size_mb(model)[0] < size_mb(model)[1] and model(x).shape == (2, 4, 6, 6)
    layer = model[2]
    assert layer.qat_stored_weight().shape == layer.weight.shape


@pytest.mark.parametrize("by_file", [True, False])
def test_signs_that_are_open_stay_so_in_a_state(by_file: bool, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    model = quantize_model(fresh(), 4)
    if by_file:
        qat.save(model, tmp_path / "m.pt")
        other = qat.load(tmp_path / "m.pt", fresh())
    else:
        other = quantize_model(fresh(), 4)
        other.load_state_dict(model.state_dict())
    x = torch.randn(6, 4)
    assert torch.equal(model(x), other(x))
    signed = {t.name: t.quantizer.format.signed for t in quantized_tensors(other)}
    assert signed["0.input"] and not signed["2.input"] and not signed["4.input"]
    assert torch.equal(other.state_dict()["2.input_quantizer.grid"], torch.tensor([4.0, 0.0]))


def test_a_network_of_one_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = quantize_model(nn.Linear(4, 4), 4, example=x)
    qat.save(model, tmp_path / "m.pt")
    assert torch.equal(qat.load(tmp_path / "m.pt", nn.Linear(4, 4))(x), model(x))


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(8, 1, 3), nn.ConvTranspose2d(8, 4, 3, groups=4)])
def test_one_output_channel_a_group_of_a_transposed_convolution(layer: nn.Module) -> None:
    """The scalars have a shape of ones; the first dimension of the weight, of size 8, is not that of the channels."""
    x = torch.randn(2, 8, 6, 6)
    model = quantize_model(nn.Sequential(copy.deepcopy(layer)), 4, first_last_bits=None, example=x)
    weight = next(t for t in quantized_tensors(model) if t.name.endswith("weight"))
    for _ in range(2):
        model(x)
    assert weight.quantizer.s.shape == ()
    torch.testing.assert_close(weight.quantizer.s, octav(layer.weight.detach(), 4), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:.* in 0.parametrizations.weight.0")
@pytest.mark.parametrize("make", made_of_others()[1:], ids=["weight_norm", "spectral_norm"])
def test_parametrizations_are_looked_at_and_taken_back(make: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    make(model[0])
    before = copy.deepcopy(model.train().state_dict())
    quantize_model(model, 4, example=x)
    assert summary(model) and size_mb(model)[0] > 0
    freeze(model, layers="*.weight")
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())
    expected, weight = model.eval()(x), model[0].weight.detach()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    torch.testing.assert_close(model(x), expected)
    assert type(model[0]) is QuantLinear and torch.equal(model[0].weight, weight)
    assert type(remove_quantizers(model)[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore:.* in the model itself")
@pytest.mark.parametrize("make", [made_of_others()[0], nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_hooks_make_are_frozen_as_they_are_loaded(make: Callable[[nn.Module], object]) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        make(layers[0])
        return quantize_model(layers, 4, example=torch.randn(4, 8))

    model, other, x = network(), network(), torch.randn(4, 8)
    with torch.no_grad():
        model[0].qat_stored_weight().mul_(torch.rand(8, 1) * 10)
    model(x)
    other.load_state_dict(model.state_dict())
    for one in (model.eval(), other):  # the second in train mode, without a call
        freeze(one, "running")
    assert torch.equal(other[0].weight_quantizer.s, model[0].weight_quantizer.s)
    assert torch.equal(other.eval()(x), model(x))


class Encoder(nn.TransformerEncoderLayer):
    """An encoder that computes attention in its own forward."""

    def __init__(self) -> None:
        super().__init__(8, 2, 16, 0.0, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        del self.self_attn

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).chunk(3, -1)
        return self._ff_block(self.norm1(x + F.scaled_dot_product_attention(q, k, v)))


def test_an_encoder_that_attends_itself_is_swapped_once() -> None:
    model, x, file = nn.Sequential(Encoder()).eval(), torch.randn(2, 5, 8), io.BytesIO()
    plain = model(x)
    quantize_model(model, example=x)
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    assert type(remove_quantizers(model)[0]) is Encoder and torch.equal(model(x), plain)


def test_an_embedding_that_renorms_its_weight_is_left_alone() -> None:
    ids, rule = torch.tensor([[1, 2], [3, 4]]), Rule("*", "Embedding", bits=8)
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 4))
    with pytest.warns(QuantizationWarning, match=r"^0 changes its weight while using it \(max_norm\): left as it is"):
        quantize_model(model, example=ids, rules=[rule])
    model(ids)
    torch.testing.assert_close(model[0].weight[1:5].norm(dim=1), torch.full((4,), 0.5))


def test_scores_that_half_precision_cannot_hold() -> None:
    torch.manual_seed(0)
    query = torch.full((1, 1, 4, 128), 30.0, dtype=torch.float16)
    value = torch.randn(1, 1, 4, 128).to(torch.float16)

    def scores(a: Tensor, b: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        assert torch.equal(a, query)  # the unscaled query is quantized
        return compute(a, b)

    found = attention(scores, torch.matmul, query, query, value)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, query, value))
