import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qat_runner.quant import (
    IntAffineFormat,
    IntFormat,
    fake_quantize,
    maximum,
    mse,
    mse_sweep,
    newton_step,
    octav,
    percentile,
)
from qat_runner.quant.kernels import compiled, using
from tests.quant.oracles import j_on_grid, octav_by_sorting, textbook_octav

BITS = (2, 3, 4, 5, 6, 8, 16)
backends = pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("compiled", marks=pytest.mark.skipif(not compiled.available(), reason="no C++ compiler"))],
)


def constant_of(bits: int, signed: bool) -> float:
    return 4.0**-bits / (3 if signed else 12)


def distribution(name: str, rows: int, n: int) -> Tensor:
    """Return random numbers [rows, n] from the distribution with this name."""
    gaussian = torch.randn(rows, n)
    return {
        "gaussian": gaussian,
        "uniform": torch.rand(rows, n) * 2 - 1,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((rows, n)),
        "student": torch.distributions.StudentT(1.5).sample((rows, n)),
        "lognormal": gaussian.exp(),
        "sparse": gaussian * (torch.rand(rows, n) < 0.1),
        "constant": torch.full((rows, n), -0.3),
        "two values": torch.where(torch.rand(rows, n) < 0.8, 1.0, 5.0),
        "tiny": gaussian * 1e-30,
        "rows of many sizes": gaussian * torch.logspace(-20, 20, rows).unsqueeze(1),
    }[name]


KINDS = [
    "gaussian",
    "uniform",
    "laplace",
    "student",
    "lognormal",
    "sparse",
    "constant",
    "two values",
    "tiny",
    "rows of many sizes",
]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 5, 6, 16))])
@pytest.mark.parametrize("kind", KINDS)
@backends
def test_octav_finds_the_minimum_on_every_row(backend: str, kind: str, bits: int, signed: bool) -> None:
    for n in (1, 2, 9, 27, 576):
        x = distribution(kind, 40, n)
        x = x if signed else x.abs()
        with using(backend):
            s = octav(x, IntFormat(bits, signed), dim=0)
        assert s.shape == (40, 1)
        expected = torch.tensor([octav_by_sorting(row, constant_of(bits, signed)) for row in x]).unsqueeze(1)
        torch.testing.assert_close(s.double(), expected.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@backends
def test_octav_of_a_large_tensor_in_every_dtype(backend: str, bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(100, 400).to(dtype)
    with using(backend):
        s = octav(x, bits)
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert s.shape == ()
    assert s.item() == pytest.approx(octav_by_sorting(x.flatten(), constant_of(bits, True)), rel=1e-4)


def test_octav_of_the_standard_gaussian() -> None:
    assert octav(torch.randn(1_000_000), 4).item() == pytest.approx(2.5655, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_octav_agrees_with_the_published_iteration_where_that_converges(bits: int) -> None:
    x = torch.randn(200_000)
    assert octav(x, bits).item() == pytest.approx(textbook_octav(x, bits, True, 30).item(), rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "kind", ["gaussian", "sparse", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("laplace", "lognormal"))]
)
def test_the_modelled_error_at_octav_is_the_least_there_is(kind: str, signed: bool) -> None:
    x = distribution(kind, 1, 50_000).abs()
    for bits in (3, 4, 6, 8):
        s = octav(x, IntFormat(bits, signed)).double()
        grid = s * torch.linspace(0.5, 1.5, 801, dtype=torch.float64)
        j = j_on_grid(x, bits, signed, torch.cat([s.view(1), grid]))
        # The paper treats the indicators of J as constant in the derivative. At 3 bits, this shifts s by up to a few
        # percent where J is flat. Only the resulting increase of J must be negligible.
        assert j[0] <= j.min() * (1.01 if bits == 3 else 1.002)


@backends
@given(
    array=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    bits=st.sampled_from(BITS),
    signed=st.booleans(),
)
def test_octav_on_anything_finite(backend: str, array: np.ndarray, bits: int, signed: bool) -> None:
    x = torch.from_numpy(array)
    x = x if signed else x.abs()
    rows = x.flatten(1)
    with using(backend):
        s = octav(x, IntFormat(bits, signed), dim=0, iterations=60).flatten()
    for row, found in zip(rows, s, strict=True):
        expected = octav_by_sorting(row, constant_of(bits, signed))
        assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-44)


def test_ten_reads_are_enough_on_rows_of_few_elements() -> None:
    x = torch.randn(4000, 9)
    for bits in (2, 4, 8):
        torch.testing.assert_close(octav(x, bits, dim=0), octav(x, bits, dim=0, iterations=60), rtol=1e-4, atol=0)


def test_octav_does_not_depend_on_its_start() -> None:
    x = torch.randn(100_000)
    for start in (0.0, 1e-6, 3.0, 5.0, x.abs().max(), 1e6, math.inf, math.nan, -1.0):
        assert octav(x, 4, init=start).item() == pytest.approx(octav(x, 4).item(), rel=1e-5)
    rows = torch.randn(8, 1000)
    torch.testing.assert_close(octav(rows, 4, dim=0, init=octav(rows, 4, dim=0) * 1.2), octav(rows, 4, dim=0))


def test_one_warm_read_is_close() -> None:
    x = torch.randn(100_000)
    s = octav(x, 4)
    assert octav(x, 4, iterations=1, init=s * 1.02).item() == pytest.approx(s.item(), rel=1e-3)


def test_octav_keeps_to_the_bulk_where_a_sweep_follows_outliers() -> None:
    """J has two minima (appendix G)."""
    x = torch.randn(100_000)
    x[:3] = 350.0
    assert octav(x, 4).item() == pytest.approx(7.9, abs=0.1)
    assert mse_sweep(x, 4).item() == 350.0


@pytest.mark.parametrize("signed", [True, False])
def test_newton_step_is_the_published_formula(signed: bool) -> None:
    x = torch.randn(5000) if signed else torch.randn(5000).relu()
    assert newton_step(x, textbook_octav(x, 4, signed, 3), IntFormat(4, signed)).item() == pytest.approx(
        textbook_octav(x, 4, signed, 4).item(), rel=1e-6
    )
    rows = torch.randn(3, 4, 5)
    s = newton_step(rows, 0.0, 4, dim=0)
    torch.testing.assert_close(s, rows.abs().mean((1, 2), keepdim=True))
    with pytest.raises(ValueError, match=r"newton_step: .* one clipping scalar, not to int_affine4"):
        newton_step(x, 1.0, IntAffineFormat(4))


def test_zeros_cost_nothing_and_are_not_counted() -> None:
    x = torch.randn(1000)
    assert octav(torch.cat([x, torch.zeros(9000)]), 4).item() == pytest.approx(octav(x, 4).item(), rel=1e-6)


def test_maximum_is_the_largest_magnitude() -> None:
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(maximum(x, 4), x.abs().max())
    torch.testing.assert_close(maximum(x, 4, dim=1), x.abs().amax((0, 2), keepdim=True))
    torch.testing.assert_close(maximum(x, IntFormat(4, False)), x.max())


QS = (0.1, 1.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999, 100.0)


def assert_is_numpys(x: Tensor, q: float) -> None:
    """Compare with NumPy in float64, per tensor and along each dimension, signed and unsigned."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = torch.finfo(dtype)
    rtol = 4 * wide.eps + 1e-15 * x.numel()  # the position of q between two elements is rounded, too
    for signed in (True, False):
        a = (x.abs() if signed else x.clamp(min=0)).double().numpy()
        for dim in (None, *range(x.ndim)):
            s = percentile(x, IntFormat(4, signed), dim, q)
            axes = None if dim is None else tuple(d for d in range(x.ndim) if d != dim)
            expected = np.percentile(a, q, axis=axes, keepdims=dim is not None) if a.size else np.zeros(s.shape)
            assert s.shape == expected.shape and s.dtype == dtype
            np.testing.assert_allclose(s.double(), expected, rtol, 2 * wide.smallest_normal * wide.eps)


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7),
        elements=st.floats(-6e4, 6e4, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 6e-8, 2.0**-14]),
    ),
    st.sampled_from(QS) | st.floats(1e-3, 100),
    st.booleans(),
)
def test_percentile_is_numpys(array: np.ndarray, q: float, half: bool) -> None:
    x = torch.from_numpy(array)
    assert_is_numpys(x.bfloat16() if half else x, q)


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.sampled_from(QS),
)
def test_percentile_of_any_finite_floats(array: np.ndarray, q: float) -> None:
    assert_is_numpys(torch.from_numpy(array), q)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_percentile_of_large_tensors(dtype: torch.dtype, q: float) -> None:
    for x in (torch.randn(50_001), torch.randn(6, 9000), torch.randn(9000, 3).relu(), torch.full((20_000,), -2.5)):
        assert_is_numpys(x.to(dtype), q)
    x = torch.randn(8, 4, 50, 20).to(memory_format=torch.channels_last)
    before = x.clone()
    assert_is_numpys(x.to(dtype), q)
    assert torch.equal(x, before)


@pytest.mark.parametrize("q", QS)
def test_percentile_waits_for_no_device(q: float) -> None:
    with FakeTensorMode():  # raises on every operation that would have to read a value
        x = torch.empty(6, 500, device="cuda")
        for dim in (None, 0, 1):
            assert percentile(x, 4, dim=dim, q=q, check=False).device.type == "cuda"


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("q", QS)
def test_percentile_elsewhere_than_on_a_cpu(q: float, dim: int | None) -> None:
    """Run a trace, which takes the code path for other devices."""

    def found(x: Tensor) -> Tensor:
        return percentile(x, 4, dim, q, check=False)

    x = torch.randn(3, 2000)
    torch.testing.assert_close(make_fx(found)(torch.zeros(3, 2000))(x), found(x), rtol=0, atol=0)


def test_percentile_of_more_elements_than_torch_quantile_takes() -> None:
    x = torch.arange(2**24 + 10, dtype=torch.float32)
    assert percentile(x, 8, q=99.9).item() == pytest.approx((2**24 + 9) * 0.999, rel=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_mse_sweep_takes_the_best_candidate(signed: bool) -> None:
    x = torch.randn(3, 500)
    x = x if signed else x.relu()
    top = x.max() if not signed else x.abs().max()
    errors = [mse(x, fake_quantize(x, top * k / 50, IntFormat(4, signed))).item() for k in range(1, 51)]
    best = (int(np.argmin(errors)) + 1) / 50
    assert mse_sweep(x, IntFormat(4, signed), points=50).item() == pytest.approx(top.item() * best, rel=1e-6)


def test_a_sweep_in_a_compiled_graph_finds_the_same() -> None:
    x = torch.randn(3, 40)
    sweep = torch.compile(lambda x: mse_sweep(x, 4, 0, 20, together=False, check=False), backend="eager")
    assert torch.equal(sweep(x), mse_sweep(x, 4, 0, 20, together=False))


def test_mse_sweep_with_rows_together_and_apart() -> None:
    x = torch.randn(4, 300) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    top = x.abs().amax(1, keepdim=True)
    apart = mse_sweep(x, 3, dim=0, together=False)
    torch.testing.assert_close(apart, torch.stack([mse_sweep(row, 3) for row in x]).unsqueeze(1))
    totals = [mse(x, fake_quantize(x, top * k / 100, 3)).item() for k in range(1, 101)]
    best = (int(np.argmin(totals)) + 1) / 100
    torch.testing.assert_close(mse_sweep(x, 3, dim=0), top * best)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "octav": octav,
    "max": maximum,
    "percentile": percentile,
    "mse_sweep": mse_sweep,
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
class TestEveryMethod:
    def test_shapes(self, name: str) -> None:
        method = FUNCTIONS[name]
        x = torch.randn(6, 3, 2, 2)
        assert method(x, 4).shape == ()
        assert method(x, 4, dim=0).shape == (6, 1, 1, 1)
        assert method(x, 4, dim=-1).shape == (1, 1, 1, 2)
        assert method(torch.tensor(-2.0), 4).item() == pytest.approx(2.0)
        torch.testing.assert_close(method(x[:, 0, 0, 0], 4, dim=0), x[:, 0, 0, 0].abs())
        torch.testing.assert_close(method(x, 4, dim=0)[2], method(x[2], 4).view(1, 1, 1), rtol=0.4, atol=0)

    def test_rows_are_solved_as_if_alone(self, name: str) -> None:
        options = {"together": False} if name == "mse_sweep" else {}
        method = FUNCTIONS[name]
        x = torch.randn(5, 3, 4)
        apart = torch.stack([method(row, 4, **options) for row in x]).view(5, 1, 1)
        torch.testing.assert_close(method(x, 4, dim=0, **options), apart)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtype_of_the_scalar(self, name: str, dtype: torch.dtype) -> None:
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert FUNCTIONS[name](torch.randn(10).to(dtype), 4).dtype == wanted

    def test_zeros_and_empty(self, name: str) -> None:
        method = FUNCTIONS[name]
        assert method(torch.zeros(7), 4).item() == 0
        assert method(torch.zeros(0), 4).item() == 0
        assert method(torch.zeros(3, 0), 4, dim=0).tolist() == [[0], [0], [0]]
        assert method(torch.zeros(0, 3), 4, dim=0).shape == (0, 1)
        x = torch.randn(3, 50)
        x[1] = 0
        assert (method(x, 4, dim=0).flatten() == 0).tolist() == [False, True, False]

    @pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 1e38])
    def test_extreme_magnitudes(self, name: str, scale: float) -> None:
        x = torch.rand(100) * 3 * scale
        s = FUNCTIONS[name](x, 4)
        assert 0.2 * x.max() <= s <= x.max()
        assert torch.isfinite(fake_quantize(x, s, 4)).all()

    def test_constants(self, name: str) -> None:
        assert FUNCTIONS[name](torch.full((5, 17), -0.3), 4).item() == pytest.approx(0.3)

    def test_negative_values_do_not_exist_for_an_unsigned_grid(self, name: str) -> None:
        x = torch.randn(400)
        options = {"q": 100.0} if name == "percentile" else {}
        method = FUNCTIONS[name]
        assert method(x, IntFormat(4, False), **options).item() == pytest.approx(
            method(x.relu(), IntFormat(4, False), **options).item()
        )

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, name: str, bad: float) -> None:
        x = torch.randn(10)
        x[3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            FUNCTIONS[name](x, 4)
        s = FUNCTIONS[name](x, 4, check=False)
        q = fake_quantize(x, s, 4)
        if math.isnan(bad):
            assert q[3].isnan()
        else:  # NaN in the whole row if the magnitude counts, otherwise the bound that it exceeds
            assert q.isnan().all() or (q[3] == math.copysign(1, bad) * q.abs().max() and q.isfinite().all()), (s, q)

    def test_finite_values_of_an_infinite_sum(self, name: str) -> None:
        x = torch.full((9,), 3e38)
        assert FUNCTIONS[name](x, 4).item() == pytest.approx(3e38)
        x[2:4] = torch.tensor([math.inf, -math.inf])
        with pytest.raises(ValueError, match="NaN or infinity"):
            FUNCTIONS[name](x, 4)

    def test_refusals(self, name: str) -> None:
        method = FUNCTIONS[name]
        with pytest.raises(ValueError, match="bits=1"):
            method(torch.randn(4), 1)
        with pytest.raises(ValueError, match=r"bits=4\.0"):
            method(torch.randn(4), 4.0)
        with pytest.raises(ValueError, match="dim=2"):
            method(torch.randn(4, 4), 4, dim=2)
        with pytest.raises(TypeError, match=r"torch\.int64"):
            method(torch.arange(4), 4)

    def test_layout_does_not_matter_and_x_is_left_alone(self, name: str) -> None:
        x = torch.randn(4, 3, 5, 5)
        before = x.clone()
        y = x.to(memory_format=torch.channels_last)
        for dim in (None, 0):
            torch.testing.assert_close(FUNCTIONS[name](x, 4, dim=dim), FUNCTIONS[name](y, 4, dim=dim))
        assert torch.equal(x, before)

    def test_no_gradient(self, name: str) -> None:
        assert not FUNCTIONS[name](torch.randn(10, requires_grad=True), 4).requires_grad


def test_option_refusals() -> None:
    x = torch.randn(10)
    for q in (0.0, -1.0, 120.0, math.nan):
        with pytest.raises(ValueError, match="percentile must lie"):
            percentile(x, 4, q=q)
    with pytest.raises(ValueError, match="iterations=0"):
        octav(x, 4, iterations=0)
    with pytest.raises(ValueError, match="points=0"):
        mse_sweep(x, 4, points=0)
