"""Weight quantization of DoReFa, compared with autograd of the published definition in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_runner.insertion import freeze, noise_report, quantize_model, quantized_tensors
from qat_runner.quant import DoReFaQuantizer
from tests.quant.oracles import straight_through

BITS = [2, 3, 4, 8]


def published(w: Tensor, bits: int) -> Tensor:
    """Quantize w by the equations of section 2.3 in float64, to [-1, 1], differentiable throughout."""
    t = w.double().tanh()
    v = t / (2 * t.abs().max()) + 0.5
    return 2 * straight_through(v * (2**bits - 1)) / (2**bits - 1) - 1


@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.floats(1e-3, 10),
)
def test_values_and_gradient(seed: int, bits: int, shape: list[int], dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(shape, generator=generator) * spread).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    w[..., 0] = w[..., -1]  # so that the largest magnitude may occur twice
    if not w.any():
        return
    mine, theirs = w.clone().requires_grad_(), w.double().requires_grad_()
    out = DoReFaQuantizer(bits)(mine)
    m = theirs.tanh().abs().max()
    expected = m * published(theirs, bits)
    levels = (theirs.tanh() / m + 1) / 2 * (2**bits - 1)
    if (
        (levels - levels.floor() - 0.5).abs() < 1e-5 * 2**bits
    ).any():  # half-way between two levels, where float32 may round either way
        return
    out.backward(upstream)
    expected.backward(upstream.double())
    epsilon = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    epsilon = max(epsilon, 1e-5) if dtype == torch.float32 else epsilon
    torch.testing.assert_close(out.double(), expected.detach(), rtol=epsilon, atol=0)
    assert out.dtype == mine.grad.dtype == dtype  # type: ignore[union-attr]
    size = float(theirs.grad.abs().max())  # type: ignore[union-attr]
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=epsilon, atol=epsilon * size + 1e-6 * size)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", BITS)
def test_where_batchnorm_follows_the_network_is_the_published_one(bits: int) -> None:
    x, w = torch.randn(8, 3, 9, 9, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64) * 0.1
    upstream = torch.randn(8, 5, 7, 7, dtype=torch.float64)
    outs, grads = [], []
    for quantize in (DoReFaQuantizer(bits).double(), lambda w: published(w, bits)):
        weight = w.clone().requires_grad_()
        norm = nn.BatchNorm2d(5, eps=1e-12).double()
        out = norm(nn.functional.conv2d(x, quantize(weight)))
        out.backward(upstream)
        outs.append(out)
        grads.append(weight.grad)
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("bits", BITS)
def test_levels(bits: int) -> None:
    w = torch.linspace(-0.7, 0.7, 100_001)
    q, count = DoReFaQuantizer(bits), 2**bits
    levels = q(w).unique()
    assert len(levels) == len(q.format.levels) == count and 0 not in q.format.levels
    torch.testing.assert_close(levels, torch.tensor(q.format.levels) * torch.tensor(0.7).tanh())
    assert q.format.levels[0] == -1 and q.format.levels[-1] == 1
    codes = torch.tensor(q.format.levels, dtype=torch.float64) * q.format.levels_per_scalar
    assert torch.equal(codes % 2, torch.ones_like(codes))  # odd
    assert codes.min() == q.format.lowest and codes.max() == q.format.highest


def test_zeros_and_not_finite_values() -> None:
    w = torch.zeros(4, requires_grad=True)
    q = DoReFaQuantizer(4)
    q(w).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [1, 1, 1, 1] and q(w).abs().max() == 0
    assert q(torch.tensor([1.0, torch.nan])).isnan().any()
    assert q(torch.zeros(0, 3, requires_grad=True)).sum().requires_grad
    with pytest.raises(ValueError, match="NaN or infinity"):
        q.eval()(torch.tensor([1.0, torch.nan]))


def test_frozen_it_computes_the_same() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    quantize_model(model, 3, "pact", example=x, activation_bits=32)
    model.eval()
    before = model(x)
    frozen = freeze(copy.deepcopy(model))
    assert not any(t.quantizer.dynamic for t in quantized_tensors(frozen))
    assert torch.equal(frozen(x), before)
    again = quantize_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)),
        3,
        "pact",
        example=x,
        activation_bits=32,
    )
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), before)


def test_nothing_of_a_weight_is_clipped() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    with torch.no_grad():
        model[0].weight.mul_(3)
    quantize_model(model, 3, "pact", example=x, activation_bits=32)
    model.train()(x)
    clipped = {row.layer: row.clipped_fraction for row in noise_report(model.eval(), [x]) if row.tensor == "weight"}
    assert clipped == {"0": 0, "2": 0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use features that PyTorch deprecates
def test_torch_compile_gives_the_same() -> None:
    q = DoReFaQuantizer(3)
    x, y = (torch.linspace(-2, 1.9, 101, requires_grad=True) for _ in range(2))
    q(x).square().sum().backward()
    torch.compile(q, fullgraph=True, backend="aot_eager")(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
