"""Each backend against float64: the three operations, per tensor and per row, in every dtype and layout."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qat_runner.quant import fake_quantize, octav
from qat_runner.quant.kernels import BACKENDS, backend, compiled, set_backend, using
from tests.quant.oracles import octav_by_sorting, quantize_by_hand

needs_compiler = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler here")
names = pytest.mark.parametrize("name", ["eager", pytest.param("compiled", marks=needs_compiler)])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# PyTorch's own compiler uses what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _back_to_eager() -> Iterator[None]:
    yield
    set_backend("eager")


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(6, 4, 5, 3).to(dtype).to(memory_format=layout)
    x[1, 2] = 0
    for signed in (True, False):
        a = x.double().abs() if signed else x.double().clamp(min=0)
        for dims, shape in (((0, 1, 2, 3), [1, 1, 1, 1]), ((1, 2, 3), [6, 1, 1, 1])):
            unit, s = torch.rand(shape) + 0.5, torch.rand(shape)
            found = BACKENDS[name].reader(x, unit, signed, dims)(s)
            scaled = a / unit.double()
            over = (scaled - s.double()).clamp(min=0)
            torch.testing.assert_close(found[4].double(), scaled.amax(dims, keepdim=True), rtol=1e-5, atol=0)
            expected = (over, over > 0, scaled, a > 0)
            for ours, theirs in zip(found[:4], expected, strict=True):
                assert list(ours.shape) == shape
                torch.testing.assert_close(ours.double(), theirs.double().sum(dims, keepdim=True), rtol=1e-5, atol=1e-5)


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(6, 4, 5, 3).to(dtype).to(memory_format=layout)
    for shape in ([], [6, 1, 1, 1]):
        s = torch.rand(shape) + 0.5
        for signed in (True, False):
            with using(name):
                q = fake_quantize(x, s, 4, signed)
            wide = s.double().expand(6, 1, 1, 1)
            expected = torch.cat(
                [quantize_by_hand(row[None], v.item(), 4, signed) for row, v in zip(x, wide, strict=True)]
            )
            torch.testing.assert_close(
                q, expected.to(dtype), rtol=0, atol=0.13 * float(s.max()) if dtype != torch.float32 else 1e-6
            )
            assert q.stride() == x.stride()
            for gradient in ("ste", "pwl", "mad"):
                torch.testing.assert_close(grad(name, x, s, signed, gradient), grad("eager", x, s, signed, gradient))


def grad(name: str, x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor:
    x = x.clone().requires_grad_()
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype)
    with using(name):
        fake_quantize(x, s, 4, signed, gradient).backward(upstream)
    assert x.grad is not None
    return x.grad


@names
def test_octav(name: str) -> None:
    with using(name):
        for x in (torch.randn(20, 9), torch.randn(3, 4000).exp(), torch.zeros(4, 5), torch.randn(2, 70) * 1e-30):
            for bits in (2, 4, 8):
                expected = [octav_by_sorting(row, 4.0**-bits / 3) for row in x]
                s = octav(x, bits, dim=0)
                torch.testing.assert_close(s.flatten().double(), torch.tensor(expected).double(), rtol=1e-4, atol=0)
        assert octav(torch.zeros(0), 4).item() == 0
        assert octav(torch.randn(5, 6, 7), 4, dim=1).shape == (1, 6, 1)  # a granularity that is left to eager
        assert octav(torch.rand(50) * 3e38, 4).isfinite()


@needs_compiler
def test_one_kernel_serves_all_sizes() -> None:
    from torch._dynamo.utils import counters

    def use(n: int) -> None:
        x = torch.randn(n, 3, 3, 3, requires_grad=True)
        fake_quantize(x, octav(x, 4, dim=0), 4).sum().backward()
        fake_quantize(x, octav(x, 4), 4, gradient="pwl").sum().backward()

    with using("compiled"):
        use(5)
        use(6)
        before = counters["stats"]["unique_graphs"]
        for n in (7, 16, 33, 64):
            use(n)
        assert counters["stats"]["unique_graphs"] == before


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_backend("eager") == "eager"
    with pytest.raises(ValueError, match="backend=cuda: must be one of auto, eager, compiled"):
        set_backend("cuda")
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert set_backend("auto") == "eager"
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found, taking eager"):
        assert set_backend("compiled") == "eager"
    assert backend() is BACKENDS["eager"]
    monkeypatch.setattr(compiled, "available", lambda: True)
    assert set_backend("auto") == "compiled"


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no such compiler\nmore")

    monkeypatch.setattr(compiled, "_compile", lambda kernel, dtype: broken)
    monkeypatch.setattr(compiled, "_broken", False)
    x = torch.randn(100)
    with using("compiled"):
        with pytest.warns(RuntimeWarning, match=r"going on with eager \(no such compiler\)"):
            s = octav(x, 4)
        q = fake_quantize(x, s, 4)  # and not a second warning
    torch.testing.assert_close(q, fake_quantize(x, octav(x, 4), 4))
