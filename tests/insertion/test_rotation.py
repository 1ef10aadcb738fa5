"""Tests of linear layers whose factors are rotated before they are quantized."""

import copy
from typing import Any

import pytest
import torch
from scipy.linalg import block_diag, hadamard
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner import Policy, Rule, calibrate, freeze, load, noise_report, quantize_model, remove_quantizers, save
from qat_runner.exporting.integer import to_integers
from qat_runner.insertion.insert import quantizers_disabled, weights_together
from qat_runner.insertion.rotation import Hadamard, block_of
from qat_runner.policy import PolicyError
from qat_runner.quant import IntFormat, fake_quantize, octav

ROTATED = Rule("*", "Linear", rotation="hadamard")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))


def rotated(model: nn.Module, example: Tensor, **how: Any) -> Any:
    return quantize_model(model, Policy.of(4, first_last_bits=None, rules=[ROTATED], **how), example=example)


@pytest.mark.parametrize("features", [1, 2, 6, 12, 96, 384])
def test_against_sylvesters_matrix(features: int) -> None:
    block = block_of(features)
    assert block == max(b for b in (1, 2, 4, 8, 16, 32, 64, 128) if features % b == 0)
    x = torch.randn(3, features, dtype=torch.float64)
    matrix = torch.from_numpy(block_diag(*[hadamard(block) / block**0.5] * (features // block)))
    once = Hadamard(block)(x)
    torch.testing.assert_close(once, x @ matrix)
    torch.testing.assert_close(Hadamard(block)(once), x)


def test_the_product_is_what_it_was_and_both_factors_are_quantized_rotated() -> None:
    x, plain = torch.randn(6, 12), network()
    model = rotated(copy.deepcopy(plain), x)
    with quantizers_disabled(model):
        torch.testing.assert_close(model(x), plain(x))
    first = model[0]
    out = first(x)
    turned = [Hadamard(4)(t) for t in (x, plain[0].weight)]
    q, w = (fake_quantize(t, octav(t.detach(), 4), 4) for t in turned)
    torch.testing.assert_close(out, F.linear(q, w, plain[0].bias))
    assert model[2].input_quantizer.format == IntFormat(4)  # although a ReLU precedes it
    assert "Hadamard(block=4)" in repr(first)
    names = {*plain.state_dict()}
    assert {n for n in model.state_dict() if "quantizer" not in n} == names
    assert type(remove_quantizers(model)[0]) is nn.Linear and {*model.state_dict()} == names


def test_gradients_come_back_rotated() -> None:
    x, plain = torch.randn(6, 12), nn.Linear(12, 3)
    model = rotated(copy.deepcopy(plain), x, gradient="ste").train()
    with weights_together(model).quantized():
        model(x).square().sum().backward()
    weight = plain.weight.detach().requires_grad_()
    turned = [Hadamard(4)(t) for t in (x, weight)]
    q, w = (fake_quantize(t, octav(t.detach(), 4), 4, "ste") for t in turned)
    F.linear(q, w, plain.bias).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, weight.grad, rtol=1e-3, atol=1e-3)  # octav, cold and warm start


def test_outliers_cost_less() -> None:
    x = torch.randn(64, 128)
    x[:, 3] *= 30
    reports = [
        noise_report(quantize_model(nn.Linear(128, 8), policy, example=x), [x])
        for policy in (Policy.of(4, first_last_bits=None), Policy.of(4, first_last_bits=None, rules=[ROTATED]))
    ]
    plain, turned = ({row.tensor: row.sqnr_db for row in report} for report in reports)
    assert turned["input"] > plain["input"] + 3


def test_it_is_saved_calibrated_and_not_exported(tmp_path: Any) -> None:
    x = torch.randn(6, 12)
    model = rotated(network(), x, dynamic=False)
    calibrate(model, [x])
    torch.testing.assert_close(model[0].weight_quantizer.s, octav(Hadamard(4)(model[0].weight.detach()), 4))
    save(model.eval(), tmp_path / "model.pt")
    again = load(tmp_path / "model.pt", network()).eval()
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="0 is rotated, which files of integers do not support"):
        to_integers(freeze(again))


@pytest.mark.parametrize(
    ("model", "rule", "text"),
    [
        (nn.Linear(7, 2), ROTATED, "rotation=hadamard needs an even number of inputs, not 7"),
        (nn.Linear(8, 2), Rule("*.weight", rotation="hadamard"), "must be set for both weight and input"),
        (
            nn.Conv2d(3, 4, 1),
            Rule("*", rotation="hadamard"),
            "and this is Conv2d",
        ),
    ],
)
def test_refusals(model: nn.Module, rule: Rule, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        quantize_model(nn.Sequential(model), Policy.of(4, rules=[rule]))
