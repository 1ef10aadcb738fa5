"""Tests of prices against the same computations written by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.allocation import Prices, distribution_objective, loss_objective, price
from qat_runner.allocation.prices import quantized_to
from qat_runner.insertion import quantize_model, quantized_tensors
from qat_runner.policy import PRICES
from qat_runner.quant import IntFormat, fake_quantize, octav

WIDTHS = (2, 4, 8)
Batch = tuple[Tensor, Tensor]


def loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    return F.cross_entropy(logits, batch[1]), len(batch[1])


CROSS_ENTROPY = loss_objective(lambda model, batch: model(batch[0]), loss)
DISTRIBUTIONS = distribution_objective(lambda model, batch: model(batch[0]))


class Residual(nn.Module):
    """x + W2 relu(W1 x), and a head: the input of W1 is also used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.two(self.one(x).relu()))
        return out


@pytest.fixture
def batches() -> list[Batch]:
    return [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(2)]


@pytest.fixture
def model(batches: list[Batch]) -> nn.Module:
    return quantize_model(Residual(), first_last_bits=None, example=batches[0][0], linear_granularity="channel")


def errors(x: Tensor, width: int, signed: bool, dim: int | None) -> Tensor:
    format = IntFormat(width, signed)
    return fake_quantize(x, octav(x, format, dim), format) - x


def by_hand(model: nn.Module, batch: Batch, width: int) -> dict[str, Tensor]:
    """Return the price by gradients of three tensors; each gradient comes from a graph that is cut at the tensor."""
    x, targets = batch
    first, second = model.get_submodule("one"), model.get_submodule("two")
    weight, one_bias = (p.detach().clone().requires_grad_() for p in (first.weight, first.bias))
    into_one, inner = x.clone().requires_grad_(), None
    inner = F.linear(into_one, weight, one_bias).relu()
    into_two = inner.detach().clone().requires_grad_()
    two = F.linear(into_two, second.weight, second.bias)
    head = model.get_submodule("head")
    out = F.cross_entropy(F.linear(x + two, head.weight, head.bias), targets)
    (g_two,) = torch.autograd.grad(out, into_two, retain_graph=True)
    g_weight, g_one = torch.autograd.grad(inner, (weight, into_one), g_two)
    pairs = {
        "one.weight": (g_weight, errors(weight.detach(), width, True, 0)),
        "one.input": (g_one, errors(x, width, True, None)),
        "two.input": (g_two, errors(inner.detach(), width, False, None)),
    }
    return {name: len(x) / 2 * (g.double() * e.double()).square().sum() for name, (g, e) in pairs.items()}


def test_the_price_by_gradients_is_half_the_fisher_information_times_squared_errors(
    model: nn.Module, batches: list[Batch]
) -> None:
    prices = price(model, batches, CROSS_ENTROPY, WIDTHS)
    for i, width in enumerate(WIDTHS):
        for at, batch in enumerate(batches):
            for name, wanted in by_hand(model, batch, width).items():
                torch.testing.assert_close(prices.batches[name][at, i], wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore:0 is called 3 times per pass")
def test_a_weight_that_is_multiplied_by_several_times_has_one_error(batches: list[Batch]) -> None:
    """Its gradient is that of all calls together."""
    layer, head = nn.Linear(6, 6), nn.Linear(6, 3)
    model = nn.Sequential(layer, layer, nn.ReLU(), layer, head)
    x, targets = batches[0]
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), targets), layer.weight)
    weight = layer.weight.detach()
    quantize_model(model, first_last_bits=None, example=x)
    prices = price(model, batches[:1], CROSS_ENTROPY, WIDTHS)
    e = torch.stack([errors(weight, width, True, None) for width in WIDTHS]).double()
    wanted = len(x) / 2 * (grad * e).square().sum((1, 2))
    torch.testing.assert_close(prices.batches["0.weight"][0], wanted, rtol=1e-4, atol=1e-9)
    ratio = e.square().sum((1, 2)) / weight.double().square().sum()
    torch.testing.assert_close(prices.noise["0.weight"], ratio, rtol=1e-4, atol=1e-9)


def test_where_no_gradient_comes_by_nothing_has_a_price(model: nn.Module, batches: list[Batch]) -> None:
    frozen = loss_objective(lambda model, batch: model(batch[0]).detach(), loss)
    assert price(model, batches, frozen, WIDTHS).batches == {}
    assert {*price(model, batches, frozen, WIDTHS, "measured").batches} == {t.name for t in quantized_tensors(model)}


def test_noise_is_relative_and_an_error_of_zero_has_none(model: nn.Module, batches: list[Batch]) -> None:
    prices = price(model, batches, CROSS_ENTROPY, WIDTHS, "noise")
    wanted = [errors(batches[0][0], w, True, None).double().square().sum() for w in WIDTHS]
    signal = batches[0][0].double().square().sum()
    torch.testing.assert_close(prices.batches["one.input"][0], torch.stack(wanted) / signal, rtol=1e-5, atol=1e-9)
    nn.init.zeros_(model.get_submodule("one").weight)  # type: ignore[arg-type]
    assert not price(model, batches, CROSS_ENTROPY, WIDTHS, "noise").batches["one.weight"].any()


def test_measured_prices_are_rises_of_the_loss_with_one_tensor_quantized(
    model: nn.Module, batches: list[Batch]
) -> None:
    prices = price(model, batches[:1], CROSS_ENTROPY, WIDTHS, "measured")
    plain = copy.deepcopy(model)
    for t in quantized_tensors(plain):
        t.quantizer.enabled = False
    weight = plain.get_submodule("two").weight
    x = batches[0][0]
    before = loss(plain.eval()(x), batches[0])[0]
    weight.data += errors(weight.data, 4, True, 0)  # type: ignore[operator,arg-type]
    torch.testing.assert_close(
        prices.batches["two.weight"][0, 1].float(), (loss(plain(x), batches[0])[0] - before).detach()
    )


def test_by_gradients_foretells_the_measured_divergence() -> None:
    """In softmax regression, the Hessian of the divergence is the Fisher information."""
    model, x = nn.Sequential(nn.Linear(20, 5)), torch.randn(20_000, 20)
    quantize_model(model, first_last_bits=None, example=x)
    foretold, measured = (
        price(model, [(x, x)], DISTRIBUTIONS, (4, 6), kind).mean()["0.input"] for kind in ("gradient", "measured")
    )
    assert foretold == pytest.approx(measured, rel=0.1)


def test_drawn_labels_are_the_same_each_time(model: nn.Module, batches: list[Batch]) -> None:
    made = [distribution_objective(lambda model, batch: model(batch[0])) for _ in range(2)]
    first, second = (price(model, batches, objective, WIDTHS).mean() for objective in made)
    assert first == second


@pytest.mark.parametrize(("shape", "dim"), [((6, 4), 1), ((3, 4, 2), 1), ((3, 5, 4), -1)])
def test_distributions_may_lie_along_any_dimension(shape: tuple[int, ...], dim: int) -> None:
    logits = torch.randn(shape)
    out, count = distribution_objective(lambda model, batch: logits, dim).loss(logits, None)
    assert count == logits.numel() // 4
    sure = torch.full(shape, -50.0)
    sure.select(dim, 2).fill_(50.0)  # so the likeliest labels are drawn
    assert distribution_objective(lambda model, batch: sure, dim).loss(sure, None)[0] == 0 and out > 0


@pytest.mark.parametrize("kind", PRICES)
def test_the_network_is_left_as_it_was(model: nn.Module, batches: list[Batch], kind: str) -> None:
    model.train().get_submodule("two").requires_grad_(False)
    before, plain = copy.deepcopy(model.state_dict()), model(batches[0][0])
    model.load_state_dict(before)
    price(model, batches, CROSS_ENTROPY, WIDTHS, kind)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(model(batches[0][0]), plain)


@pytest.mark.parametrize("kind", PRICES)
def test_more_bits_cost_less(model: nn.Module, batches: list[Batch], kind: str) -> None:
    for row in price(model, batches, CROSS_ENTROPY, (2, 3, 4, 6, 8), kind).mean().values():
        assert abs(row[8]) < max(abs(row[2]), 1e-6)


@pytest.mark.parametrize("how", [{"format": "int_affine"}, {"range": "oriented"}, {"clipping": "max"}])
def test_any_format_range_and_method_has_prices(batches: list[Batch], how: dict[str, Any]) -> None:
    model = quantize_model(Residual(), first_last_bits=None, example=batches[0][0], **how)
    quantizer = next(t.quantizer for t in quantized_tensors(model) if t.name == "one.input")
    ratio = price(model, batches[:1], CROSS_ENTROPY, WIDTHS, "noise").batches["one.input"][0, 1]
    x = batches[0][0]
    e = quantizer.quantized(x, quantizer.scalars_of(x)) - x  # at the bit-width that it has in any case
    assert quantizer.format.bits == WIDTHS[1]
    assert float(ratio) == pytest.approx(float(e.square().sum() / x.square().sum()), rel=1e-5)


def test_tensors_have_the_bits_that_they_are_given(batches: list[Batch]) -> None:
    x, layer = batches[0][0], nn.Linear(6, 3)
    weight = layer.weight.detach()
    model = quantize_model(nn.Sequential(layer), first_last_bits=None, example=x)
    with torch.no_grad(), quantized_to(model, {"0.weight": 2}):
        out = model(x)
    torch.testing.assert_close(out, F.linear(x, weight + errors(weight, 2, True, None), layer.bias).detach())


def test_resampled_batches_have_their_mean() -> None:
    prices = Prices("noise", (2, 4), {"a": torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)}, {})
    assert prices.mean() == {"a": {2: 2.0, 4: 4.0}} and prices.count == 2
    assert prices.mean([1, 1, 0]) == {"a": {2: pytest.approx(7 / 3), 4: pytest.approx(14 / 3)}}


def test_what_cannot_be_priced_is_refused(model: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(ValueError, match="price='hessian': must be one of gradient, noise, measured"):
        price(model, batches, CROSS_ENTROPY, WIDTHS, "hessian")
    with pytest.raises(ValueError, match="no batch"):
        price(model, [], CROSS_ENTROPY, WIDTHS)
    with pytest.raises(ValueError, match="not finite"):
        price(model, [(batches[0][0] * float("nan"), batches[0][1])], CROSS_ENTROPY, WIDTHS)


def test_a_tensor_costs_nothing_to_batches_that_do_not_come_by_it(model: nn.Module, batches: list[Batch]) -> None:
    def head_alone_then_all(m: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = m.get_submodule("head")(batch[0]) if batch is batches[0] else m(batch[0])
        return out

    prices = price(model, batches, distribution_objective(head_alone_then_all), WIDTHS)
    assert not prices.batches["one.weight"][0].any() and prices.batches["one.weight"][1].all()
    head = price(model, batches[:1], distribution_objective(head_alone_then_all), WIDTHS)
    assert set(head.batches) == {"head.weight", "head.input"}
