"""LSQ and PACT, compared with autograd of their written-out definitions, and the rules for their use."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_runner.config import StageConfig
from qat_runner.insertion import calibrate, load, noise_report, quantize_model, quantized_tensors, save
from qat_runner.quant import (
    LSQ,
    PACT,
    Call,
    DoReFaQuantizer,
    Format,
    IntAffineFormat,
    IntFormat,
    LearnedMethod,
    LearnedQuantizer,
    Octav,
    Quantizer,
    octav,
)
from qat_runner.training.recipe import make_optimizer
from tests.quant.oracles import straight_through


def learned(
    method: LearnedMethod, bits: int = 4, signed: bool = True, shape: tuple[int, ...] = (), weight: bool = True
) -> LearnedQuantizer:
    """Return a learned quantizer, for an activation if the method quantizes weights in another way."""
    weight = weight and method.name != "pact"
    q = method.quantizer(IntFormat(bits, signed), weight=weight, shape=shape)
    assert isinstance(q, LearnedQuantizer)
    return q


def ready(method: LearnedMethod, x: Tensor, **how: Any) -> LearnedQuantizer:
    q = learned(method, **how)
    q.assign(q.scalars_of(x))
    return q


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_lsq_against_its_definition(signed: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(6, 40)
    q = ready(LSQ(), x, signed=signed, shape=shape)
    lowest, highest = (-8, 7) if signed else (0, 15)
    a = x.abs() if signed else x.clamp(min=0)
    mean = a.mean() if shape == () else a.mean(1, keepdim=True)
    torch.testing.assert_close(q.learned.data, 2 * mean / math.sqrt(highest))

    upstream = torch.randn_like(x)
    mine = x.clone().requires_grad_()
    out = q(mine)
    out.backward(upstream)

    theirs, step = x.clone().requires_grad_(), q.learned.detach().clone().requires_grad_()
    count = x.numel() // step.numel()
    scale = 1 / math.sqrt(count * highest)
    scaled = step * scale + (step - step * scale).detach()  # the gradient scale, as in the LSQ paper
    expected = straight_through((theirs / scaled).clamp(lowest, highest)) * scaled
    expected.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(q.learned.grad, step.grad, rtol=1e-4, atol=1e-6)


def test_lsq_counts_the_features_of_one_sample() -> None:
    x = torch.randn(8, 3, 5)
    grads = []
    for per_sample in (True, False):
        q = ready(LSQ(), x, weight=not per_sample)
        q(x).sum().backward()
        grads.append(q.learned.grad)
    torch.testing.assert_close(grads[0], grads[1] * math.sqrt(8))


def attending(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a network and a batch of eight; some tensors have the tokens of all samples in their first dimension."""
    torch.manual_seed(0)
    if kind == "windows":
        model: nn.Module = nn.Sequential(
            nn.Unflatten(1, (4, 3)), nn.Flatten(0, 1), nn.Linear(3, 3), nn.Unflatten(0, (-1, 4))
        )
        return model, torch.randn(8, 12)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(8, 5, 8)


@pytest.mark.parametrize("kind", ["attention", "windows"])
def test_lsq_knows_samples_wherever_they_lie(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same for a batch at once and in parts, also for a network loaded from a file."""
    counted: dict[str, set[int]] = {}
    count = LearnedQuantizer._count

    def noted(quantizer: LearnedQuantizer, x: Tensor) -> int:
        found = count(quantizer, x)
        counted.setdefault(quantizer.name, set()).add(found)
        return found

    monkeypatch.setattr(LearnedQuantizer, "_count", noted)
    model, x = attending(kind)
    saved = copy.deepcopy(model)
    quantize_model(model, 4, "lsq", first_last_bits=None, example=x[:2])
    calibrate(model, [x])
    save(model, tmp_path / "network.pt")
    for network in (model.train(), load(tmp_path / "network.pt", saved).train()):
        grads = []
        for parts in (1, 4):
            network.zero_grad()
            for part in x.chunk(parts):
                network(part).square().sum().backward()
            learned = {t.name: t.quantizer.learned.grad for t in quantized_tensors(network)}  # type: ignore[union-attr]
            grads.append(learned)
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
        sizes = {t.name: t.elements for t in quantized_tensors(network) if t.tensor != "weight"}
        assert {name: counted.pop(name) for name in sizes} == {name: {size} for name, size in sizes.items()}


def pact(x: Tensor, alpha: Tensor, bits: int, signed: bool) -> Tensor:
    """Quantize by equations 1 to 3 of PACT, with their gradients; if signed, by the symmetric extension."""
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -alpha if signed else torch.zeros_like(alpha)
    y = torch.where(x >= alpha, alpha, torch.where(x <= low, low, x))
    return y + ((y * steps / alpha).round() * alpha / steps - y).detach()


def alike(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Check equality within a few rounding errors of the dtype, relative to the largest number."""
    assert found is not None and expected is not None
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


HALF = [torch.float16, torch.bfloat16]


@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, *HALF]),
    st.floats(0.1, 20),
    st.lists(st.integers(0, 6), max_size=4),
)
def test_pact_against_its_definition(
    seed: int, bits: int, signed: bool, dtype: torch.dtype, alpha: float, shape: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * alpha).to(dtype)
    flat, at = x.flatten(), torch.tensor([0.0, alpha, -alpha, 2 * alpha]).to(dtype)
    flat[: min(4, len(flat))] = at[: len(flat)]  # zeros, and values exactly at alpha
    x = flat.view(shape)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    q = learned(PACT(alpha), bits, signed).to(torch.float64 if dtype == torch.float64 else torch.float32)
    q.assign(q.scalars_of(x.new_zeros(1)))
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    alphas = q.learned.detach().double().requires_grad_()
    out, expected = q(mine), pact(theirs, alphas, bits, signed)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert isinstance(q.format, IntFormat)
    steps = x.double() / alphas.detach() * q.format.levels_per_scalar
    if not ((steps - steps.floor() - 0.5).abs() < 1e-5 * 2**bits).any():  # near ties, float32 may round either way
        alike(out, expected.detach(), dtype)
    assert mine.grad is not None and theirs.grad is not None
    assert torch.equal(mine.grad.double(), theirs.grad)
    assert q.learned.grad is not None and alphas.grad is not None
    total = upstream.double().abs().sum().item()
    eps = 1e-15 if dtype == torch.float64 else 1e-6  # precision of the dtype of the sum
    assert abs(q.learned.grad.item() - alphas.grad.item()) <= eps * total


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_of_pact_ends_at_alpha(bits: int) -> None:
    x = torch.linspace(-3, 3, 200_001)
    for signed in (False, True):
        q = ready(PACT(2.5), x, signed=signed, bits=bits)
        levels = q(x).detach().unique()
        assert len(levels) == len(q.format.levels) == 2**bits - signed
        assert levels[-1].item() == pytest.approx(2.5) and levels[0].item() == pytest.approx(-2.5 if signed else 0)
        step = 2.5 / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        torch.testing.assert_close(levels.diff(), torch.full_like(levels[1:], step))
        torch.testing.assert_close(levels, torch.tensor(q.format.levels) * 2.5)


@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([torch.float32, *HALF]),
    st.sampled_from([(), (6, 1), (6, 1, 1)]),
)
def test_half_precision_costs_lsq_no_more_than_its_rounding(
    seed: int, bits: int, signed: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Compare with float64, using the codes of the forward pass."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, 8, generator=generator)[: 6 if shape else 4]
    x = (x[:, 0] if len(shape) == 2 else x).to(dtype)
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    q = ready(LSQ(), x, signed=signed, shape=shape, bits=bits)
    if (q.learned == 0).any():  # an unsigned row without a positive element
        return
    mine = x.clone().requires_grad_()
    out = q(mine)
    out.backward(upstream)

    step, g = q.learned.detach().double(), upstream.double()
    v = x.double() / step
    code = (q(x.float()).detach().double() / step).round()
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    inside = (v > lowest) & (v < highest)
    elementwise = g * torch.where(inside, code - v, code) / math.sqrt(x.numel() / step.numel() * highest)
    assert torch.equal(out, q(x.float()).to(dtype))
    near = ((v - lowest).abs() < 1e-5) | ((v - highest).abs() < 1e-5)
    assert mine.grad is not None and q.learned.grad is not None
    assert torch.equal((mine.grad.double() == g * inside) | near, torch.ones_like(near))
    if not near.any():
        error = (q.learned.grad - elementwise.sum_to_size(step.shape)).abs()
        assert (error <= 1e-5 * elementwise.abs().sum_to_size(step.shape) + 1e-12).all()


@pytest.mark.parametrize("method", [LSQ, PACT])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_gives_the_gradients_of_the_same_numbers_in_float32(
    method: type[LearnedMethod], dtype: torch.dtype
) -> None:
    x, upstream = torch.randn(8, 3, 16, 16).to(dtype), torch.randn(8, 3, 16, 16).to(dtype)
    alpha = 1.705 if dtype == torch.bfloat16 else 1.7004  # x contains numbers that alpha would be rounded down to
    x[0, 0, 0] = alpha
    grads = []
    for kind in (dtype, torch.float32):
        q = ready(PACT(alpha) if method is PACT else method(), x)
        mine = x.clone().to(kind).requires_grad_()
        q(mine).backward(upstream.to(kind))
        assert mine.grad is not None and q.learned.grad is not None
        grads.append((mine.grad.float(), q.learned.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-5)  # another backend computes the sum


@pytest.mark.parametrize("method", [LSQ(), PACT()], ids=lambda method: method.name)
def test_sums_do_not_overflow_in_half_precision(method: LearnedMethod) -> None:
    x = torch.full((4, 50_000), 30.0, dtype=torch.float16)
    q = learned(method).half()  # the scalar stays in float32
    q.assign(torch.tensor(8.0 if method.name == "lsq" else 1.0))
    assert q.learned.item() == 1
    q(x).backward(torch.full_like(x, 60.0))
    assert q.learned.dtype == torch.float32 and q.s.dtype == torch.float32
    assert q.learned.grad is not None and q.learned.grad.item() > 65504
    expected = 60.0 * x.numel() * (7 / math.sqrt(x.numel() * 7) if method.name == "lsq" else 1)
    assert q.learned.grad.item() == pytest.approx(expected, rel=1e-5)


def test_float64_is_summed_in_float64() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    q = learned(PACT(0.5)).double()
    q.assign(q.scalars_of(x))
    upstream = torch.randn_like(x)
    q(x).backward(upstream)
    assert q.learned.grad is not None and q.learned.grad.dtype == torch.float64
    exact = math.fsum((upstream * ((x >= 0.5).double() - (x <= -0.5).double())).tolist())
    assert q.learned.grad.item() == pytest.approx(exact, rel=1e-13)


def test_starts() -> None:
    assert PACT().solve(torch.randn(3), IntFormat(4), None, Call()).item() == 10
    assert LSQ().solve(torch.zeros(5), IntFormat(4), None, Call()).item() == 0
    with pytest.raises(RuntimeError, match="no clipping scalars yet"):
        learned(LSQ())(torch.randn(3))


@pytest.mark.parametrize("format", [IntFormat(3), IntFormat(3, False), IntAffineFormat(3)], ids=lambda f: f.name)
def test_a_start_where_the_error_is_least(format: Format) -> None:
    x = torch.randn(4, 200).exp() - 0.5
    q = LSQ(start="octav").quantizer(format, weight=True, shape=(4, 1))
    assert isinstance(q, LearnedQuantizer)
    q.assign(q.scalars_of(x))
    q(x)
    torch.testing.assert_close(q.latest(), octav(x, format, 0))
    with pytest.raises(ValueError, match="start='mean': must be one of lsq, octav"):
        LSQ(start="mean")


def test_a_step_below_zero_does_no_harm() -> None:
    q = ready(LSQ(), torch.randn(50))
    q.learned.data.fill_(-0.1)
    assert q(torch.randn(50)).isfinite().all()


def test_evaluation_uses_what_was_learned_and_state_travels() -> None:
    x = torch.randn(100)
    q = ready(LSQ(), x)
    q.learned.data.mul_(1.5)
    trained = q(x).detach()
    q.eval()
    assert torch.equal(q(x), trained)
    torch.testing.assert_close(q.s, q.learned * 8)
    again = learned(LSQ())
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), trained)
    static = Quantizer(4, Octav(), dynamic=False)
    static.assign(static.scalars_of(x))
    again.load_state_dict(static.state_dict())
    torch.testing.assert_close(again.learned.data * 8, static.s)
    fresh = learned(LSQ())
    fresh.load_state_dict({})  # as from a full-precision model


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_a_network_learns_its_scalars(method: str) -> None:
    x = torch.randn(8, 3, 8, 8)
    model = quantize_model(network(), 3, method, example=x)
    calibrate(model, [x])
    optimizer = make_optimizer(model, StageConfig(weight_decay=0.1), lr=0.01)
    kinds = {t.name: type(t.quantizer) for t in quantized_tensors(model)}
    assert kinds["2.input"] is LearnedQuantizer
    assert kinds["2.weight"] is (LearnedQuantizer if method == "lsq" else DoReFaQuantizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    quantizer = next(t.quantizer for t in quantized_tensors(model) if t.name == "2.input")
    assert isinstance(quantizer, LearnedQuantizer)
    assert decay[id(quantizer.learned)] == (0.0 if method == "lsq" else 0.1)
    assert decay[id(model[2].weight)] == (0.05 if method == "lsq" else 0.1)  # half at 3 bits
    assert decay[id(model[0].weight)] == 0.1  # 8 bits
    before = quantizer.learned.item()
    model(x).square().sum().backward()
    optimizer.step()
    assert quantizer.learned.item() != before
    model(x)
    assert quantizer.last_s is not None and quantizer.s.item() == quantizer.last_s.item()


def test_the_penalty_of_alpha_is_that_of_weights_under_adamw_too() -> None:
    x = torch.randn(4, 6)
    model = quantize_model(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), 4, "pact", example=x)
    optimizer = make_optimizer(model, StageConfig(optimizer="adamw", weight_decay=0.1), lr=0.01)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    learned = [q.learned for q in model.modules() if isinstance(q, LearnedQuantizer)]
    assert len(learned) == 2 and all(decay[id(p)] == 0.1 for p in learned)
    assert decay[id(model[0].bias)] == 0.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_of_pact_travels_in_a_state_dict(bits: int) -> None:
    x = torch.randn(4, 3, 8, 8)
    model, again = (quantize_model(network(), bits, "pact", example=x) for _ in range(2))
    calibrate(model, [x])
    with torch.no_grad():
        for q in model.modules():
            if isinstance(q, LearnedQuantizer):
                q.learned.uniform_(1, 3)
    expected = model(x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use features that PyTorch deprecates
@pytest.mark.parametrize("method", [LSQ(), PACT()], ids=lambda method: method.name)
def test_torch_compile_gives_the_same(method: LearnedMethod) -> None:
    grads = []
    for wrap in (lambda q: q, lambda q: torch.compile(q, backend="aot_eager")):
        x = torch.linspace(-3, 2.9, 101, requires_grad=True)
        q = ready(method, x.detach(), signed=True)
        wrap(q)(x).square().sum().backward()
        grads.append((x.grad, q.learned.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_noise_is_measured_on_the_grid_of_the_quantizer() -> None:
    x = torch.randn(8, 3, 8, 8)
    model = quantize_model(network(), 3, "pact", alpha=1.0, example=x, first_last_bits=None)
    calibrate(model, [x])
    rows = {f"{r.layer}.{r.tensor}": r for r in noise_report(model, [x])}
    low, high = -1.0, 1.0
    assert rows["0.input"].mse == pytest.approx((x - (x.clamp(low, high) * 3).round() / 3).square().mean().item())
    w = model[2].weight.detach()
    m = w.tanh().abs().max()
    levels = torch.arange(-7, 8, 2) / 7 * m
    nearest = levels[(w.tanh()[..., None] - levels).abs().argmin(-1)]
    assert rows["2.weight"].mse == pytest.approx((w - nearest).square().mean().item(), rel=1e-4)


def test_parameters_alone_are_a_state() -> None:
    """Averages of parameters may come without buffers."""
    x = torch.randn(100)
    there, here = ready(LSQ(), x), ready(LSQ(), 3 * x)
    found = here.load_state_dict(dict(there.named_parameters()), strict=False)
    assert torch.equal(here.learned, there.learned) and torch.equal(here(x), there(x))
    assert "s" in found.missing_keys and not found.unexpected_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        here.load_state_dict(dict(there.named_parameters()))
