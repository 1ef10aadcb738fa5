"""Weights that are quantized together get the same results as those that are quantized alone."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat_runner.insertion import quantize_model, quantized_tensors
from qat_runner.insertion.insert import weights_together
from qat_runner.quant import Quantizer, kernels
from qat_runner.quant.weight_groups import WeightsTogether

WEIGHTS = ("a", "b", "c", "d", "e")


class Network(nn.Module):
    """Has weights with rows of all lengths, in one of two layouts; `e` is trained, but not used in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 70, 3, padding=1)
        self.b = nn.Conv2d(70, 70, 3, padding=1, groups=70)
        self.c = nn.Conv2d(70, 8, 1)
        self.d, self.e = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).mean((2, 3))
        return self.d(x) + self.e(x) if both else self.d(x)


def network(
    dtype: torch.dtype = torch.float32, channels_last: bool = False, first_last_bits: int = 4, **policy: object
) -> nn.Module:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8)
    model = quantize_model(Network(), 4, example=x, first_last_bits=first_last_bits, **policy).to(dtype)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def step(model: nn.Module, weights: WeightsTogether | None, both: bool = True, passes: int = 1) -> None:
    """Run one training step of gradient descent."""
    x = torch.rand(4, 3, 8, 8).to(next(model.parameters()).dtype)
    with nullcontext() if weights is None else weights.quantized(passes):
        for _ in range(passes):
            model(x, both).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad


def same(model: nn.Module, reference: nn.Module) -> None:
    """Check that weights, gradients and scalars are equal bit for bit."""
    for (name, found), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"first_last_bits": 8},
        {"channels_last": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"warm_iterations": None},
        {"gradient": "ste"},
        {"conv_granularity": "tensor", "linear_granularity": "channel"},
        {"clipping": "max"},
    ],
    ids=str,
)
def test_together_as_alone(how: dict[str, object], backend: str) -> None:
    with kernels.using(backend):
        alone = network(**how)  # type: ignore[arg-type]
        model = copy.deepcopy(alone)
        weights = weights_together(model, bucket=2000)
        for i in range(3):
            torch.manual_seed(i)
            step(alone, None)
            torch.manual_seed(i)
            step(model, weights)
            same(model, alone)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tensors in each call that solves, or computes gradients, for several tensors."""
    seen: list[int] = []
    with kernels.using("eager"):
        backend = kernels.load_backend("eager")
        for name in ("octav_and_quantize_all", "fake_quantize_backward_all"):
            does = getattr(backend, name)

            def counted(xs: list[Tensor], *args: object, does: object = does) -> object:
                seen.append(len(xs))
                return does(xs, *args)  # type: ignore[operator]

            monkeypatch.setattr(backend, name, counted)
        yield seen


def test_calls(calls: list[int]) -> None:
    """All weights with scalars to start from take one call to quantize and one for gradients, or one per bucket."""
    model = network()
    weights = weights_together(model)
    step(model, weights)
    assert calls == []
    step(model, weights)
    assert calls == [5, 5]
    sizes = {name: model.get_submodule(name).weight.nbytes for name in WEIGHTS}  # type: ignore[union-attr]
    step(model, weights_together(model, bucket=sizes["a"] + sizes["b"] + 1))
    assert calls[2:] == [2, 3, 3, 2]
    model.get_submodule("d.weight_quantizer").enabled = False
    step(model, weights)
    assert calls[6:] == [4, 4]


def test_a_layer_that_is_not_reached_gets_no_gradient(calls: list[int]) -> None:
    model = network()
    weights = weights_together(model)
    step(model, weights)
    model.zero_grad()
    step(model, weights, both=False)
    assert calls == [5, 4]
    assert model.get_submodule("e").weight.grad is None
    assert all(q._calls.given is None for q in quantizers(model))


def test_several_passes_share_one_quantization(calls: list[int]) -> None:
    model = network(warm_iterations=None)
    weights = weights_together(model)
    step(model, weights)
    twice, before = copy.deepcopy(model), [int(q.batches) for q in quantizers(model)]
    model.zero_grad()
    twice.zero_grad()
    torch.manual_seed(1)
    step(model, weights, passes=2)
    assert calls == [5, 5]
    assert [int(q.batches) for q in quantizers(model)] == [n + 1 for n in before]
    torch.manual_seed(1)
    x = torch.rand(4, 3, 8, 8)
    for _ in range(2):
        twice(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_layer_that_is_called_twice_quantizes_its_weight_twice() -> None:
    """The second call works as usual, starting from the scalars of the first."""
    layer = quantize_model(nn.Sequential(nn.Linear(6, 6)), 4, example=torch.randn(2, 6))
    weights, q = weights_together(layer), quantizers(layer)[0]
    for n in (2, 4):
        with weights.quantized():
            layer(layer(torch.randn(3, 6))).sum().backward()
        assert q.batches == n


def test_errors_leave_nothing_behind() -> None:
    model = network()
    weights = weights_together(model)
    step(model, weights)
    with pytest.raises(RuntimeError), weights.quantized():
        model(torch.rand(2, 1, 8, 8))
    assert all(q._calls.given is None for q in quantizers(model))
    with weights.quantized():
        out = model(torch.rand(2, 3, 8, 8)).square().sum()
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(out, [*model.parameters()], create_graph=True)


def quantizers(model: nn.Module) -> list[Quantizer]:
    return [t.quantizer for t in quantized_tensors(model) if t.tensor == "weight"]


class Checkpointed(nn.Module):
    """Blocks that are recomputed in the backward pass. With batches of WIDTH, all tensors have the same shape."""

    WIDTH = 16

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(self.WIDTH, self.WIDTH), nn.ReLU(), nn.Linear(self.WIDTH, self.WIDTH), nn.ReLU())
            for _ in range(2)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("clipping", ["octav", "max"])  # octav solves for all weights together, max for each one alone
def test_activation_checkpointing(clipping: str, reentrant: bool, passes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(Checkpointed.WIDTH, Checkpointed.WIDTH, requires_grad=True)
    plain = quantize_model(Checkpointed(None), 4, clipping, example=x.detach(), first_last_bits=4)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant  # type: ignore[assignment]
    for one in (plain, model):
        weights = weights_together(one)
        for step_ in range(3):
            one.zero_grad()
            torch.manual_seed(step_)
            with weights.quantized(passes):
                for _ in range(passes):
                    one(x).square().sum().backward()
    same(model, plain)
    assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_weight_asks_for_no_gradient() -> None:
    model = network()
    model.get_submodule("a").weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    weights = weights_together(model)
    step(model, weights)
    seen: list[Tensor] = []
    model.get_submodule("a").register_forward_hook(lambda module, args, out: seen.append(out))
    model.get_submodule("a").bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    step(model, weights)
    assert not seen[0].requires_grad and model.get_submodule("a").weight.grad is None


def test_hooks_of_a_weight_see_gradients_alone(calls: list[int]) -> None:
    model = network()
    model.get_submodule("e").weight.register_hook(lambda grad: grad * 2)  # type: ignore[union-attr, operator]
    weights = weights_together(model)
    step(model, weights)
    step(model, weights, both=False)
    assert calls == [4, 4]
