"""The bit allocation of a small trained network, compared with the measured loss of all others within the budget."""

import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from qat_runner.allocation import COSTS, Limit, allocate_bits, distribution_objective, divergence, network, price
from qat_runner.allocation.prices import quantized_to
from qat_runner.insertion import quantize_model

WIDTHS = (2, 3, 4, 6, 8)


def trained() -> tuple[nn.Module, torch.Tensor]:
    """Return a network of three layers, trained on handwritten digits, and the digits."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        some = torch.randint(0, 1300, (128,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "budget", "better"),
    [("gradient", 3.0, 0.05), ("gradient", 4.0, 0), ("measured", 3.0, 0), ("measured", 4.0, 0)],
)
def test_next_to_no_choice_within_the_budget_is_better(kind: str, budget: float, better: float) -> None:
    """Choices are compared by their divergence from full precision.

    Differences in the loss of so few samples would depend on their labels, that is, on chance.

    Args:
        kind: the kind of price.
        budget: the largest average bit-width.
        better: the share of all choices that may be better than the one that was made. At 3 bits, errors are too large
            to be predicted by gradients.
    """
    model, x = trained()
    quantize_model(model, first_last_bits=None, example=x[:2])
    known = network(model, WIDTHS, 2)
    objective = distribution_objective(lambda model, batch: model(batch))
    prices = price(model, x[:512].split(128), objective, WIDTHS, kind).mean()
    limits = [Limit(measure, budget) for measure in COSTS["mean_bits"](known)]
    with torch.no_grad(), quantized_to(model, {}):
        full = model(x[1300:])

    @torch.no_grad()
    def loss(bits: dict[str, int]) -> float:
        with quantized_to(model, bits):
            return float(divergence(model(x[1300:]), full, 1.0, 1))

    names = [operand.name for operand in known.free]
    every = (dict(zip(names, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=len(names)))
    least = budget - 0.7  # a choice that uses less of the budget is not compared
    rivals = [bits for bits in every if all(least < limit.measure.total(known, bits) <= budget for limit in limits)]
    losses = [loss(bits) for bits in rivals]
    assert len(losses) > 300
    ours = loss(allocate_bits(known, prices, limits).bits)
    assert ours <= 1.02 * min(losses) or sum(other < ours for other in losses) <= better * len(losses)
