import copy
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import pytest
import torch
from torch import Tensor

from qat_runner.quant import (
    Call,
    ClippingMethod,
    Format,
    IntAffineFormat,
    IntFormat,
    Maximum,
    NotCalibratedError,
    Octav,
    Quantizer,
    clipping_method,
    fake_quantize,
    kernels,
    maximum,
    octav,
)
from qat_runner.quant.kernels import eager
from qat_runner.quant.limits import check_options
from qat_runner.quant.shared_scalars import WORTH


def test_dynamic_solves_in_training_and_remembers() -> None:
    q = Quantizer(4, Octav(warm_iterations=None), momentum=0.25)
    first, second = torch.randn(100), torch.randn(100) * 3
    torch.testing.assert_close(q(first), fake_quantize(first, octav(first, 4), 4))
    torch.testing.assert_close(q.running_s, octav(first, 4))
    q(second)
    torch.testing.assert_close(q.s, octav(second, 4))
    torch.testing.assert_close(q.running_s, 0.75 * octav(first, 4) + 0.25 * octav(second, 4))
    assert q.batches.item() == 2


@pytest.mark.parametrize("mode", ["dynamic", "running", "last"])
def test_eval_modes(mode: str) -> None:
    q = Quantizer(4, Octav(), eval_mode=mode)
    for _ in range(3):
        q(torch.randn(100))
    before = copy.deepcopy(q.state_dict())
    q.eval()
    x = torch.randn(100) * 5
    s = {"dynamic": octav(x, 4), "running": q.running_s, "last": q.s}[mode]
    torch.testing.assert_close(q(x), fake_quantize(x, s, 4))
    assert all(torch.equal(q.state_dict()[k], v) for k, v in before.items())  # eval stores nothing


def test_static_keeps_what_it_is_assigned() -> None:
    q = Quantizer(4, Octav(), dynamic=False)
    q.name = "conv.input"
    with pytest.raises(NotCalibratedError, match=r"conv\.input \(static\) has no clipping scalars yet"):
        q(torch.randn(10))
    x = torch.randn(100)
    assert torch.equal(q.scalars_of(x), octav(x, 4)) and not q.has_scalars
    q.assign(torch.tensor(1.5), batches=3)
    for _ in (q.train(), q.eval()):
        torch.testing.assert_close(q(x * 9), fake_quantize(x * 9, 1.5, 4))
        assert (q.s.item(), q.batches.item(), q.mode) == (1.5, 3, "static")
    q.name = "fc.weight"
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"fc\.weight: clipping scalars must be finite and not negative"):
            q.assign(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"fc\.weight: x of shape"):
        q.scalars_of(torch.tensor([1.0, float("nan")]))


def test_per_channel() -> None:
    q = Quantizer(4, Maximum(), shape=(6, 1, 1, 1))
    x = torch.randn(6, 3, 3, 3)
    torch.testing.assert_close(q(x), fake_quantize(x, maximum(x, 4, dim=0), 4))
    assert (q.granularity, q.dim, tuple(q.s.shape)) == ("channel", 0, (6, 1, 1, 1))
    assert Quantizer(4, Octav(), shape=(1, 1)).dim == 0


def test_state_travels() -> None:
    q, other = Quantizer(4, Octav()), Quantizer(4, Octav(), eval_mode="last")
    q(torch.randn(50))
    other.load_state_dict(q.state_dict())
    other.eval()
    x = torch.randn(50)
    torch.testing.assert_close(other(x), fake_quantize(x, q.s, 4))
    fresh = Quantizer(4, Octav())
    fresh.load_state_dict({})  # a full-precision state dict has no such keys
    with pytest.raises(RuntimeError, match="size mismatch"):
        Quantizer(4, Octav(), shape=(3, 1)).load_state_dict(q.state_dict())


def test_what_is_known_of_a_state_moves_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = Quantizer(4, Octav(), eval_mode="last").eval(), torch.randn(50)
    q.assign(torch.tensor(1.5))
    other = copy.deepcopy(q)
    reads: list[Quantizer] = []
    read = Quantizer._read
    monkeypatch.setattr(Quantizer, "_read", lambda self: reads.append(self) or read(self))
    q._apply(torch.clone)  # as in a move to another device, where a read would wait
    assert torch.equal(q(x), fake_quantize(x, 1.5, 4)) and not reads
    for t in q.buffers():
        t.zero_()
    q._apply(torch.clone)
    assert not q.has_scalars and reads == [q]
    for t in other.buffers():
        t.zero_()
    assert not other.has_scalars


def test_scalars_stay_in_full_precision() -> None:
    q = Quantizer(4, Octav())
    q(torch.randn(100))
    before = q.s.clone()
    half = q.half()
    assert half.s.dtype == torch.float32
    assert torch.equal(half.s, before)
    assert half(torch.randn(10, dtype=torch.float16)).dtype == torch.float16
    assert q.double().s.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_of_another_dtype_is_not_taken_for_float32(dtype: torch.dtype) -> None:
    """Kernels write float32 to memory; a state of another dtype gets the same scalars without them."""
    x, plain, others = torch.randn(40), Quantizer(4, Octav()), []
    torch.set_default_dtype(dtype)
    try:
        others.append(Quantizer(4, Octav()))
    finally:
        torch.set_default_dtype(torch.float32)
    others.append(torch.nn.Sequential(Quantizer(4, Octav())).double().to(dtype)[0])
    loaded = Quantizer(4, Octav())
    loaded.load_state_dict({k: v.to(dtype) for k, v in loaded.state_dict().items()}, assign=True)
    for q in (plain, *others, loaded):
        for batch in (x, 2 * x):
            q(batch)
    for q in (*others, loaded):
        assert q.s.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(q.s.float(), plain.s)
        torch.testing.assert_close(q.running_s.float(), plain.running_s)
        assert int(q.batches) == 2


def test_scalars_that_do_not_suit_the_state_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape|size"):
        Quantizer(4, Octav(), shape=(8, 1))(torch.randn(16, 40))


def test_scalars_of_any_layout_are_remembered() -> None:
    for found in (torch.rand(1).expand(1000, 1), torch.tensor(0.7)):
        q = Quantizer(4, Octav(), shape=(1000, 1))
        q.remember(found, 0.1)
        assert torch.equal(q.s, found.expand(1000, 1)) and torch.equal(q.running_s, q.s)


def test_what_a_step_overwrites_is_noticed() -> None:
    """An evaluation uses scalars that the next training step overwrites."""
    q, x = Quantizer(4, Octav(), eval_mode="last", gradient="mad"), torch.randn(20, requires_grad=True)
    q(x)
    out = q.eval()(x)
    q.train()(10 * x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_tensors_stay_where_they_are_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, format = torch.randn(6, 40), IntFormat(4)
    expected = octav(x, format, 0), octav(x, IntAffineFormat(4), 0), octav(x, format, 0, refine=8)
    torch.set_default_device("meta")
    try:
        found = octav(x, format, 0), octav(x, IntAffineFormat(4), 0), octav(x, format, 0, refine=8)
    finally:
        torch.set_default_device("cpu")
    assert all(map(torch.equal, found, expected))


def test_not_finite_is_refused_outside_training_only() -> None:
    q = Quantizer(4, Octav())
    bad = torch.tensor([1.0, float("nan")])
    assert q(bad).isnan().any()
    q.eval()
    with pytest.raises(ValueError, match="NaN or infinity"):
        q(bad)


def test_disabled_passes_on() -> None:
    q = Quantizer(2, Octav())
    q.enabled = False
    x = torch.randn(10)
    assert q(x) is x


@dataclass(frozen=True)
class PartOfMaximum(ClippingMethod):
    name: ClassVar[str] = "part_of_max"
    share: float = 0.5

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        return maximum(x, format, dim, check=call.check) * self.share


def test_a_clipping_method_of_ones_own() -> None:
    q = Quantizer(4, PartOfMaximum(0.25))
    x = torch.randn(30)
    torch.testing.assert_close(q(x), fake_quantize(x, x.abs().max() * 0.25, 4))
    assert "part_of_max" in repr(q) and q.method.options == {"share": 0.25}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": 1}, "bits=1"),
        ({"format": 4, "gradient": "mph"}, "gradient='mph'"),
        ({"format": 4, "eval_mode": "mean"}, "eval_mode='mean'"),
        ({"format": 4, "momentum": 5.0}, "momentum=5"),
        ({"format": 4, "method": clipping_method("percentile"), "synchronize": True}, "'percentile' cannot be synch"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer(**{"method": Octav(), **arguments})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("best", {}, ValueError, "clipping='best': must be one of octav, max"),
        ("octva", {}, ValueError, "did you mean octav"),
        ("percentile", {"q": 120.0}, ValueError, "q=120"),
        ("mse_sweep", {"points": 0}, ValueError, "points=0"),
        ("octav", {"iterations": 0}, ValueError, "iterations=0"),
        ("octav", {"iterations": 2.5}, ValueError, "iterations=2.5: must be an integer"),
        ("octav", {"refine": True}, ValueError, "refine=True: must be an integer"),
        ("octav", {"missing_code": "no"}, ValueError, "missing_code='no': must be true or false"),
        ("percentile", {"q": "high"}, ValueError, "q='high': must be a number"),
        ("octav", {"warm_iterations": 0}, ValueError, "warm_iterations=0"),
        ("octav", {"q": 99.0}, TypeError, "no option 'q', only iterations, warm_iterations"),
        ("max", {"q": 99.0}, TypeError, "no option 'q', only none"),
        ("pact", {"alpha": -1.0}, ValueError, "alpha=-1"),
        ("lsq", {"alpha": 2.0}, TypeError, "clipping 'lsq' has no option 'alpha', only start"),
    ],
)
def test_options_are_checked_when_a_method_is_made(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        clipping_method(name, **options)


def test_a_bad_batch_does_not_spoil_the_average() -> None:
    q = Quantizer(4, Octav())
    q(torch.ones(3))
    q(torch.tensor([float("nan"), 1.0]))
    assert q.s.isfinite()
    assert q.running_s.isfinite()


def test_warm_start_follows_slow_change_and_recovers_from_jumps() -> None:
    x = torch.randn(20_000)
    q, cold = Quantizer(4, Octav(warm_iterations=1)), Quantizer(4, Octav(warm_iterations=None))
    for step in range(20):
        q(x * 1.02**step)
        cold(x * 1.02**step)
        torch.testing.assert_close(q.s, cold.s, rtol=1e-3, atol=0)
    for factor in (30.0, 1e-3, 1e4):
        for _ in range(4):
            q(x * factor)
        torch.testing.assert_close(q.s, octav(x * factor, 4), rtol=2e-2, atol=0)
    q(torch.zeros(100))
    assert q.s == 0
    for _ in range(4):
        q(x)
    torch.testing.assert_close(q.s, octav(x, 4), rtol=2e-2, atol=0)
    q.eval()
    torch.testing.assert_close(q(x * 50), fake_quantize(x * 50, octav(x * 50, 4), 4))  # evaluation converges
    assert Octav().warm and not Octav(warm_iterations=None).warm and not Maximum().warm


class Counting:
    """Counts how often the reference backend solves for scalars."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.solved = 0
        solve = eager.octav

        def octav(*args: Any) -> Tensor:
            self.solved += 1
            return solve(*args)

        monkeypatch.setattr(eager, "octav", octav)


def test_a_tensor_that_several_layers_share_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer gets the same result as without sharing, bit for bit."""
    counting = Counting(monkeypatch)
    together, alone = ([Quantizer(4, Octav()).train() for _ in range(3)] for _ in range(2))
    with kernels.using("eager"):
        for step in range(3):
            x = torch.randn(WORTH // 8, 8)
            copies = [x.clone() for _ in alone]
            counting.solved = 0
            outs = [q(x) for q in together]
            assert counting.solved == 1
            for q, other, out, copied in zip(together, alone, outs, copies, strict=True):
                assert torch.equal(out, other(copied))
                assert all(torch.equal(t, u) for t, u in zip(q.buffers(), other.buffers(), strict=True))
                assert torch.equal(q.latest(), other.latest()) and q.batches == step + 1
            assert counting.solved == 4


def test_what_is_not_the_same_is_solved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    x = torch.randn(8, WORTH // 8)
    method = Octav()
    with kernels.using("eager"):
        Quantizer(4, method)(x)
        for other in (
            Quantizer(8, method),
            Quantizer(IntFormat(4, signed=False), method),
            Quantizer(4, method, shape=(8, 1)),
            Quantizer(4, Octav(missing_code=True)),
        ):
            before = counting.solved
            other(x)
            assert counting.solved == before + 1
        before = counting.solved
        x.mul_(2)
        Quantizer(4, method)(x)
        assert counting.solved == before + 1
        with torch.inference_mode():
            y = torch.randn(WORTH)
            Quantizer(4, method)(y)
            Quantizer(4, method)(y)
        assert counting.solved == before + 3


def test_shared_tensors_are_not_kept_alive() -> None:
    q, x = Quantizer(4, Octav()), torch.randn(WORTH)
    q(x)
    alive = weakref.ref(x)
    del x
    assert alive() is None


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_scalar_an_element(backend: str) -> None:
    x = torch.randn(8)
    with kernels.using(backend):
        q = Quantizer(4, Octav(), shape=(8,))
        assert torch.equal(q(x), fake_quantize(x, octav(x, 4, dim=0), 4))


def test_a_parameter_that_several_layers_share_is_solved_by_each() -> None:
    """Optimizers may write to it without changing its version, as PyTorch's fused ones do."""
    weight = torch.nn.Parameter(torch.randn(WORTH))
    first, last = Quantizer(4, Octav()), Quantizer(4, Octav())
    optimizer = torch.optim.AdamW([weight], lr=0.3, fused=True)
    for _ in range(2):
        out = first(weight) + last(weight)
        torch.testing.assert_close(first.latest(), last.latest())
        out.sum().backward()
        optimizer.step()


@dataclass
class _Declared:
    whole: int = 1
    perhaps: Optional[float] = 1.0  # noqa: UP045
    either: int | float = 1
    mixed: str | int = "auto"
    many: int | list[int] = 1


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("whole", [3], [3.0, True, None, "3"]),
        ("perhaps", [None, 2, 2.5], ["high", True]),
        ("either", [2, 2.5], ["high", False, None]),
        ("mixed", ["fast", 2], []),
        ("many", [[1, 2], 2], []),
    ],
)
def test_options_are_of_the_kind_that_is_declared(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_options("it", _Declared, {name: value})
    for value in bad:
        with pytest.raises(ValueError, match=f"{name}={value!r}: must be"):
            check_options("it", _Declared, {name: value})


@pytest.mark.parametrize(
    "transform", [lambda f: torch.func.grad(lambda x: f(x).sum()), torch.vmap], ids=["grad", "vmap"]
)
def test_a_transform_leaves_nothing_behind(transform: Any) -> None:
    q, x = Quantizer(4, Octav()).eval(), torch.randn(3, 5)
    transform(q)(x)
    assert torch.equal(copy.deepcopy(q)(x), q(x))
