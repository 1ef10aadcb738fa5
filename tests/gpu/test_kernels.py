"""The operations of a device's backend against float64, in every dtype and layout, for short and long rows."""

import pytest
import torch
from torch import Tensor

from qat_runner.quant import IntAffineFormat, IntFormat
from qat_runner.quant.kernels import Backend, backend, eager, set_backend
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered
from tests.quant.oracles import interval_cost, octav_by_sorting, quantize_by_hand

FORMAT = IntFormat(4)
SEARCH = Search((1, 2, 3), 20, 1e-4)
SHORT, LONG = (4, 3, 5, 4), (2, 3, 100, 60)
every_kind = pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        (dtype, layout, shape)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for layout in (torch.contiguous_format, torch.channels_last)
        for shape in (SHORT, LONG)
    ],
)


@pytest.fixture(autouse=True)
def _auto() -> None:
    set_backend("auto")


@pytest.fixture
def x(each_device: torch.device, dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, ...]) -> Tensor:
    """Return rows of very different magnitudes."""
    wide = torch.randn(shape) * torch.logspace(-2, 2, shape[0]).view(-1, 1, 1, 1)
    return wide.to(dtype).to(memory_format=layout).to(each_device)


def ours(x: Tensor) -> Backend:
    found = backend(x)
    assert x.device.type == "cpu" or found.__name__.endswith("triton")  # type: ignore[attr-defined]
    return found


def solution(x: Tensor) -> Tensor:
    """Return the exact scalars, float64 [rows, 1, 1, 1]."""
    rows = [octav_by_sorting(row.double().flatten().cpu(), FORMAT.rounding_noise) for row in x]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 1, 1, 1)


def is_rounded(q: Tensor, x: Tensor, s: Tensor) -> None:
    """Check the rounding by hand, except halfway between two codes, where float32 may round the other way."""
    assert q.shape == x.shape and q.dtype == x.dtype and q.stride() == x.stride()
    wide, s = x.cpu().double(), s.cpu().double()
    pairs = zip(wide, s.flatten(), strict=True)
    expected = torch.stack([quantize_by_hand(row, v.item(), 4, True) for row, v in pairs])
    eps = torch.finfo(x.dtype).eps
    near = (q.cpu().double() - expected).abs() <= eps * expected.abs() + 1e-12
    halfway = ((wide / s * 8).frac().abs() - 0.5).abs() < 1e-4
    assert (near | halfway).all()


@every_kind
def test_octav(x: Tensor) -> None:
    cost, expected = Cost(FORMAT.rounding_noise, True), solution(x)
    guess = (expected * 1.2).float().to(x.device)
    for start in (None, guess):
        found = ours(x).octav(x, cost, start, SEARCH)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=0)


@every_kind
def test_octav_interval(x: Tensor) -> None:
    """Compared with the float64 reference by the cost J, because J is flat near the solution."""
    x, noise = x + x.abs() / 2, IntAffineFormat(4).rounding_noise
    expected = eager.octav_interval(x.cpu().double(), noise, None, SEARCH)
    for guess in (None, (expected * 1.2).float().to(x.device)):
        found = ours(x).octav_interval(x, noise, guess, SEARCH)
        costs = [interval_cost(x.cpu(), ends.cpu(), noise, SEARCH.dims) for ends in (found, expected)]
        assert (costs[0] <= costs[1] * 1.05).all()


@every_kind
def test_octav_and_quantize(x: Tensor) -> None:
    cost, expected = Cost(FORMAT.rounding_noise, True), solution(x)
    before = (expected * 1.1).float().to(x.device)
    batches = torch.ones((), dtype=torch.int64, device=x.device)
    state = Remembered(before.clone(), before.clone(), batches, 0.25, True)
    s, q = ours(x).octav_and_quantize(x, cost, FORMAT, SEARCH, state, True)
    torch.testing.assert_close(s.cpu().double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(state.s, s) and batches.item() == 2
    torch.testing.assert_close(state.running_s, before.lerp(s, 0.25))
    is_rounded(q, x, s)


def test_remember(each_device: torch.device) -> None:
    s = torch.ones(2, device=each_device)
    state = Remembered(s.clone(), s.clone(), torch.zeros((), dtype=torch.int64, device=s.device), 0.5, True)
    ours(state.s).remember(torch.tensor([3.0, torch.nan], device=s.device), state)
    assert state.s.tolist() == [3, 1] and state.running_s.tolist() == [2, 1] and state.batches.item() == 1


@every_kind
def test_orient(x: Tensor) -> None:
    s = solution(x).float().to(x.device)
    wide, t = x.cpu().double(), s.cpu().double() / 2
    above = (wide - torch.minimum(torch.maximum(wide, -t), t)).sum((1, 2, 3)) > 0
    assert torch.equal((ours(x).orient(x, s, None, 0.5, 0.0) < 0).flatten().cpu(), above)


@every_kind
def test_refine(x: Tensor) -> None:
    """No candidate has a smaller error than the result."""

    def error(s: Tensor) -> Tensor:
        pairs = zip(x.cpu().double(), s.cpu().double().flatten(), strict=True)
        return torch.stack([(row - quantize_by_hand(row, v.item(), 4, True)).square().sum() for row, v in pairs])

    s, factors = solution(x).float().to(x.device), (0.8, 0.9, 1.0, 1.1)
    found = error(ours(x).refine(x, s, FORMAT, factors))
    assert all((found <= error(s * factor) * (1 + 1e-4)).all() for factor in factors)


@every_kind
def test_fake_quantize_and_its_gradients(x: Tensor) -> None:
    s = solution(x).float().to(x.device)
    is_rounded(ours(x).fake_quantize(x, s, FORMAT), x, s)
    grad = torch.randn_like(x)
    wide, t = x.cpu().double(), s.cpu().double()
    clipped = torch.minimum(torch.maximum(wide, -t), t)
    alpha = torch.where(wide == 0, 1.0, clipped / wide)
    for gradient, factor in (("pwl", (clipped == wide).double()), ("mad", alpha), ("ste", torch.ones_like(wide))):
        found = ours(x).fake_quantize_backward(grad, x, s, FORMAT, gradient).cpu().double()
        expected = grad.cpu().double() * factor
        torch.testing.assert_close(found, expected, rtol=torch.finfo(x.dtype).eps, atol=torch.finfo(x.dtype).tiny)


@every_kind
def test_learned_backward(x: Tensor) -> None:
    s, grad = solution(x).float().to(x.device), torch.randn_like(x)
    for format, rounding in ((FORMAT, True), (IntAffineFormat(4), True), (IntFormat(4, range="full"), False)):
        scalars = torch.stack([-0.7 * s, s]) if format.parts == 2 else s
        found, sums = ours(x).learned_backward(grad, x, scalars, format, rounding)
        wide = (t.cpu().double() for t in (grad, x, scalars))
        expected, total = eager.learned_backward(*wide, format, rounding)
        assert torch.equal(found.cpu().double(), expected)
        torch.testing.assert_close(sums.cpu().double(), total, rtol=1e-3, atol=1e-2)
