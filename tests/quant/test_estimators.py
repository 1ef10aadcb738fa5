import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qat_runner import quantize_model
from qat_runner.quant import (
    GRADIENTS,
    LSQ,
    DoReFaQuantizer,
    Estimator,
    Format,
    IntAffineFormat,
    IntFormat,
    MidriseFormat,
    Range,
    fake_quantize,
    gradient_estimator,
    octav,
)
from tests.quant.oracles import quantize_by_hand


def by_autograd(x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor:
    """Return a tensor whose gradient by autograd is that of the estimator, written out (section 4)."""
    low = -s if signed else torch.zeros_like(s)
    if gradient == "ste":
        return x * 1.0
    if gradient == "pwl":
        return torch.where((x >= low) & (x <= s), x, x.detach().clamp(low, s))
    clipped = torch.minimum(torch.maximum(x.detach(), low), s)
    alpha = torch.where(clipped == x.detach(), torch.ones_like(x), clipped / x.detach())
    return alpha * x


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (2, 1, 1)])
def test_gradients_against_autograd_of_the_written_out_estimators(
    gradient: str, signed: bool, shape: tuple[int, ...]
) -> None:
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    x[0, 0, :3] = torch.tensor([0.0, 0.8, -0.8])
    s = torch.full(shape, 0.8, dtype=torch.float64)
    upstream = torch.randn_like(x)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    fake_quantize(ours, s, IntFormat(4, signed), gradient).backward(upstream)
    by_autograd(theirs, s, signed, gradient).backward(upstream)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def ewgs_by_hand(g: float, x: float, levels: list[float], ends: tuple[float, float], delta: float) -> float:
    """Return the gradient by equation 7 of EWGS, on normalized values and levels; 0 for clipped values."""
    low, high = ends
    if not low <= x <= high:
        return 0.0
    normalized = (x - low) / (high - low)
    rounded = min(((level - low) / (high - low) for level in levels), key=lambda level: abs(normalized - level))
    return g * (1 + delta * math.copysign(1, g) * (normalized - rounded))


def trust_by_hand(g: float, x: float, levels: list[float], ends: tuple[float, float], factor: float) -> float:
    """Return the gradient if the nearest level is close enough, as in QuEST's mask; otherwise 0."""
    return g if min(abs(x - level) for level in levels) <= factor * (levels[-1] - levels[-2]) / 2 else 0.0


INTERVALS: dict[Format, tuple[float, ...]] = {
    IntFormat(3): (0.8,),
    IntFormat(3, False): (0.8,),
    IntFormat(2, True, Range.FULL): (0.8,),
    IntFormat(3, True, Range.ORIENTED): (-0.8,),
    IntAffineFormat(3): (-0.4, 0.8),
    MidriseFormat(2): (0.8,),
}


@pytest.mark.parametrize("format", INTERVALS, ids=lambda f: f"{f.name}{f.oriented}")
@pytest.mark.parametrize(
    ("estimator", "by_hand", "option"),
    [
        (gradient_estimator("ewgs", delta=0.3), ewgs_by_hand, 0.3),
        (gradient_estimator("trust"), trust_by_hand, 1.0),
        (gradient_estimator("trust", factor=0.6), trust_by_hand, 0.6),
    ],
    ids=["ewgs", "trust", "little trust"],
)
def test_other_estimators_against_their_definitions(
    format: Format, estimator: Estimator, by_hand: Callable[..., float], option: float
) -> None:
    s = torch.tensor(INTERVALS[format], dtype=torch.float64).squeeze()
    low, high = (float(end) for end in format.clipping_bounds(s))
    levels = fake_quantize(torch.linspace(-2, 2, 1001, dtype=torch.float64), s, format).unique().tolist()
    x = (torch.randn(200, dtype=torch.float64) * 0.6).requires_grad_()
    upstream = torch.randn_like(x)
    fake_quantize(x, s, format, estimator).backward(upstream)
    wanted = [by_hand(g, v, levels, (low, high), option) for g, v in zip(upstream.tolist(), x.tolist(), strict=True)]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_all_that_is_only_rounded_is_trusted(bits: int) -> None:
    """All gradients pass, also where a step is hardly larger than float32's rounding error at the outermost codes."""
    s, format = torch.tensor(3.0), IntFormat(bits, True, Range.FULL)
    x = (torch.rand(100_000) * 6 - 3).requires_grad_()
    fake_quantize(x, s, format, gradient_estimator("trust")).sum().backward()
    assert x.grad is not None and x.grad.all()


def test_they_meet_where_they_must() -> None:
    """EWGS with delta 0 is pwl; trust on a full range passes gradients up to half a step outside the interval."""
    x, s, upstream = torch.randn(4, 50), torch.tensor([[0.3], [0.8], [0.0], [2.0]]), torch.randn(4, 50)
    x[2] = 0

    def gradient(estimator: str | Estimator, s: Tensor, format: Format) -> Tensor | None:
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, s, format, estimator).backward(upstream)
        return leaf.grad

    format = IntFormat(3, True, Range.FULL)
    ewgs = gradient(gradient_estimator("ewgs", delta=0.0), s, format)
    torch.testing.assert_close(ewgs, gradient("pwl", s, format))
    torch.testing.assert_close(gradient("trust", s, format), gradient("pwl", s * (1 + 0.5 / 3), format))


def test_in_a_network_as_outside_of_it() -> None:
    """An estimator with options works for weights that are quantized together, and for activations."""
    estimator = gradient_estimator("ewgs", delta=0.5)
    model = quantize_model(torch.nn.Linear(6, 4, bias=False), 3, gradient=estimator, first_last_bits=None)
    x = torch.randn(5, 6, requires_grad=True)
    model(x).square().sum().backward()
    again, weight = x.detach().clone().requires_grad_(), model.weight.detach().clone().requires_grad_()
    scalars = model.input_quantizer.last_s, model.weight_quantizer.last_s
    q, w = (fake_quantize(t, s, 3, estimator) for t, s in zip((again, weight), scalars, strict=True))
    (q @ w.T).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(model.weight.grad, weight.grad)
    assert "gradient=ewgs(delta=0.5)" in repr(model)


@given(
    hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=8), elements=st.floats(-1e6, 1e6)),
    st.floats(1e-6, 1e6),
    st.integers(2, 16),
    st.booleans(),
)
def test_values_against_the_table(array: np.ndarray, s: float, bits: int, signed: bool) -> None:
    x = torch.from_numpy(array)
    torch.testing.assert_close(fake_quantize(x, s, IntFormat(bits, signed)), quantize_by_hand(x, s, bits, signed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_the_grid(bits: int, signed: bool) -> None:
    x = torch.linspace(-3, 3, 1_000_001, dtype=torch.float64)
    s = 1.25
    q = fake_quantize(x, s, IntFormat(bits, signed))
    levels = q.unique()
    assert len(levels) == 2**bits
    step = s / 2 ** (bits - 1) if signed else s / 2**bits
    torch.testing.assert_close(levels.diff(), torch.full_like(levels[1:], step))
    assert levels[0].item() == (-s if signed else 0)
    assert levels[-1].item() == pytest.approx(s - step)
    assert torch.equal(fake_quantize(q, s, IntFormat(bits, signed)), q)  # idempotent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_dtypes_are_kept(dtype: torch.dtype, gradient: str) -> None:
    x = torch.randn(64).to(dtype).requires_grad_()
    q = fake_quantize(x, octav(x, 4), 4, gradient=gradient)
    q.sum().backward()
    assert q.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(
        q.double(), quantize_by_hand(x.detach(), octav(x, 4).item(), 4, True), rtol=8e-3, atol=1e-3
    )


def test_zero_scalars_and_not_finite_values() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.5, 0.1]], requires_grad=True)
    q = fake_quantize(x, torch.tensor([[0.0], [1.0]]), 4)
    assert q[0].abs().tolist() == [0, 0, 0]
    q.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 0, 0], [1, 1, 1]]
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    out = fake_quantize(odd, 1.0, 4)
    assert out[0].isnan()
    assert out[1:].tolist() == [0.875, -1.0, 0.875]
    assert fake_quantize(torch.ones(2), float("nan"), 4).isnan().all()
    assert fake_quantize(torch.zeros(0, 3), 1.0, 4).shape == (0, 3)


def test_only_x_and_s_are_saved() -> None:
    saved: list[Tensor] = []
    x, s = torch.randn(100, requires_grad=True), torch.tensor(1.0)

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fake_quantize(x, s, 4)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), s.data_ptr()}
        saved.clear()
        fake_quantize(x, s, 4, gradient="ste")
        assert saved == []


def test_double_backward_is_refused() -> None:
    x = torch.randn(10, requires_grad=True)
    for gradient in GRADIENTS:
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(fake_quantize(x, 1.0, 4, gradient=gradient).square().sum(), x, create_graph=True)
    for quantizer in (DoReFaQuantizer(4), LSQ().quantizer(IntFormat(4), weight=True)):
        quantizer.assign(torch.tensor(0.7))
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(quantizer(x).square().sum(), x, create_graph=True)


def test_autocast() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(fake_quantize(x, octav(x, 4), 4))
        again = fake_quantize(out, octav(out, 4), 4)
    assert out.dtype == again.dtype == torch.bfloat16
    again.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use features that PyTorch deprecates
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_torch_compile_gives_the_same(gradient: str) -> None:
    def loss(x: Tensor, s: Tensor) -> Tensor:
        return fake_quantize(x, s, 4, gradient=gradient).square().sum()

    x, y = (torch.linspace(-2, 2, 101, requires_grad=True) for _ in range(2))
    loss(x, torch.tensor(1.0)).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y, torch.tensor(1.0)).backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


def test_refusals() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="gradient='mph'"):
        fake_quantize(x, 1.0, 4, gradient="mph")
    for name, option, value in (("ewgs", "delta", -1.0), ("trust", "factor", 0.0), ("trust", "factor", True)):
        with pytest.raises(ValueError, match=f"{option}={value}: must be"):
            gradient_estimator(name, **{option: value})
    with pytest.raises(TypeError, match="gradient 'pwl' has no option 'delta', only none"):
        gradient_estimator("pwl", delta=1.0)
    with pytest.raises(ValueError, match="bits=17"):
        fake_quantize(x, 1.0, 17)
    with pytest.raises(TypeError, match="must be floating"):
        fake_quantize(torch.arange(3), 1.0, 4)
    with pytest.raises(ValueError, match="does not broadcast"):
        fake_quantize(x, torch.ones(3), 4)
    with pytest.raises(ValueError, match="does not broadcast"):
        fake_quantize(x, torch.ones(2, 3, 4), 4)
    with pytest.raises(ValueError, match="must not require a gradient"):
        fake_quantize(x, torch.ones((), requires_grad=True), 4)
