"""Tests of how batches become the arguments of a forward pass, and of how many samples they have."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion.modes import inputs_of
from qat_runner.insertion.tensors import samples_in

IMAGES = torch.randn(8, 3, 6, 6)
TOKENS = torch.zeros(4, 16, dtype=torch.long)


@dataclass
class Fields:
    length: int
    images: Tensor


@pytest.mark.parametrize(
    ("inputs", "samples"),
    [
        ((IMAGES,), 8),
        (([*IMAGES],), 8),
        ((tuple(IMAGES), [{"boxes": torch.randn(2, 4)} for _ in range(8)]), 8),
        ({"scale": torch.tensor(1.0), "images": IMAGES}, 8),
        ({"scale": torch.ones(1), "shift": torch.ones(1), "images": IMAGES}, 8),
        ((torch.ones(3), IMAGES[:1]), 1),
        ((torch.zeros(1, 16), TOKENS, torch.zeros(16)), 4),
        ((torch.randn(5, 2), IMAGES, torch.randn(8, 1)), 8),
        (({"input_ids": TOKENS, "labels": None}, True), 4),
        ((Fields(3, IMAGES),), 8),
        ((IMAGES[:0],), 0),
        ((torch.randn(5), torch.randn(5)), 5),
        ((torch.tensor(1.0), 2, None, []), 1),
    ],
)
def test_the_number_of_samples(inputs: Any, samples: int) -> None:
    assert samples_in(inputs) == samples


class OneName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class AnyName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, **batch: Tensor) -> Tensor:
        return batch["x"]


class Anything(nn.Module):
    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        for i, module in enumerate(inside):
            self.add_module(str(i), module)

    def forward(self, *args: Any, **named: Any) -> Any:
        return args, named


class InOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = OneName()

    def forward(self, *args: Any) -> Any:
        return args


@pytest.mark.parametrize(
    ("model", "by_name"),
    [
        (OneName(), True),
        (nn.Linear(4, 4), False),
        (AnyName(), True),
        (Anything(OneName()), True),
        (Anything(nn.Linear(4, 4)), False),
        (Anything(nn.Linear(4, 4), OneName()), True),
        (Anything(nn.ModuleList([OneName()])), True),
        (InOrder(), False),
    ],
)
def test_a_mapping_is_passed_by_name_where_forward_takes_names(model: nn.Module, by_name: bool) -> None:
    batch = {"x": torch.randn(2, 4)}
    assert inputs_of(model, batch) == (batch if by_name else (batch,))
