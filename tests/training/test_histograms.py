"""The range of tensor histograms."""

import torch
from torch import nn

from qat_runner.insertion import freeze, quantize_model
from qat_runner.training.histograms import REACH, histograms


def test_what_lies_out_of_sight_is_of_all_batches() -> None:
    x = torch.linspace(-1, 1, 101).reshape(1, 101)
    model = quantize_model(nn.Sequential(nn.Linear(101, 2)), 4, "max", first_last_bits=None, example=x)
    freeze(model, "averaged", [x])
    (tensor,) = [h for h in histograms(model.eval(), [x, 3 * REACH * x, 2 * x]) if h["tensor"] == "input"]
    assert tensor["beyond"] > 0
    assert tensor["highest"] == -tensor["lowest"]
    assert abs(tensor["highest"] - 3 * REACH) < 1e-4
