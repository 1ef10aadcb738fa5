"""Tests that products of tensors are found where they are computed, whatever requests them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qat_runner.insertion import load, not_quantized, quantize_model, quantized_share, save, summary, trace
from qat_runner.insertion.insert import QuantizationWarning
from qat_runner.insertion.products import Products

A, B, W = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(8, 16)
BATCHES = torch.tensor([4, 10], dtype=torch.int32)


def counted(function: Callable[[], Any]) -> dict[str, int]:
    products = Products(lambda: ("", ""))
    with torch.no_grad(), products:
        function()
    return {operation: macs for (_, _, operation), macs in products.found.items()}


def recurrent(kind: type[nn.Module], gates: int) -> tuple[Callable[[], Any], int]:
    layer = kind(16, 8, batch_first=True) if "Cell" not in kind.__name__ else kind(16, 8)
    x, steps = (A, 10) if "Cell" not in kind.__name__ else (A[:, 0], 2)
    return lambda: layer(x), steps * gates * 8 * (16 + 8)


CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "LSTM": recurrent(nn.LSTM, 4),
    "GRU": recurrent(nn.GRU, 3),
    "RNN": recurrent(nn.RNN, 1),
    "LSTMCell": recurrent(nn.LSTMCell, 4),
    "GRUCell": recurrent(nn.GRUCell, 3),
    "inner": (lambda: torch.inner(A, W), 10 * 8 * 16),
    "tensordot": (lambda: torch.tensordot(A, W, ([2], [1])), 10 * 8 * 16),
    "einsum": (lambda: torch.einsum("bij,kj->bik", A, W), 10 * 8 * 16),
    "linalg": (lambda: torch.linalg.matmul(A, W.T), 10 * 8 * 16),
    "mv": (lambda: torch.mv(W, A[0, 0]), 8 * 16),
    "dot": (lambda: torch.dot(W[0], W[1]), 16),
    "addbmm": (lambda: torch.addbmm(torch.zeros(5, 5), A, B.mT), 2 * 5 * 5 * 16),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(5, 5), A, B.mT), 2 * 5 * 5 * 16),
    "in place": (lambda: torch.zeros(5, 5).addmm_(A[0], B[0].T), 5 * 5 * 16),
    "bilinear": (lambda: F.bilinear(A, B, torch.randn(3, 16, 16)), 10 * 3 * 16 * 16),
    "cdist": (lambda: torch.cdist(A, B), 2 * 5 * 5 * 16),
    "large cdist": (lambda: torch.cdist(torch.randn(40, 3), torch.randn(30, 3)), 40 * 30 * 3),
    "attention": (lambda: F.scaled_dot_product_attention(A[:, None], B[:, None], B[:, None]), 2 * 2 * 5 * 5 * 16),
    "grouped_mm": (
        lambda: F.grouped_mm(A.view(10, 16).bfloat16(), torch.randn(2, 16, 8).bfloat16(), offs=BATCHES),
        10 * 16 * 8,
    ),
    "convolution": (lambda: F.conv2d(torch.randn(2, 4, 6, 6), torch.randn(8, 2, 3, 3), groups=2), 2 * 8 * 16 * 2 * 9),
    "transposed": (lambda: F.conv_transpose1d(torch.randn(2, 4, 6), torch.randn(4, 3, 2)), 2 * 4 * 6 * 3 * 2),
    "none": (lambda: (A * B).sum() + A.softmax(-1).mean() + torch.outer(W[0], W[1]).sum(), 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inference", [False, True])
def test_multiply_accumulates_by_hand(name: str, inference: bool) -> None:
    function, macs = CASES[name]
    with torch.inference_mode(inference):
        assert sum(counted(function).values()) == macs


@given(
    st.integers(1, 3),
    st.sampled_from([(4, 6, 1), (4, 8, 2), (4, 4, 4)]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
)
def test_convolutions_as_torch_counts_them(
    n: int, channels: tuple[int, int, int], k: int, stride: int, transposed: bool
) -> None:
    come, leave, groups = channels
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(come, leave, k, stride=stride, groups=groups), torch.randn(n, come, 7, 5)
    with FlopCounterMode(display=False) as flops:
        layer(x)
    assert sum(counted(lambda: layer(x)).values()) == flops.get_total_flops() // 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.inner(self.layer(x), self.weight)


def test_shares_and_what_is_repeated(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.ModuleList([Block(), Block()])[0], Block(), nn.Linear(16, 8))

    model = network()
    with pytest.warns(QuantizationWarning) as said:
        quantize_model(model, example=A)
    assert [str(w.message) for w in said] == [
        "mm in 2 modules * (Block), 44 % of the multiply-accumulates are not quantized: "
        "only convolution layers, linear layers, experts and attention are"
    ]
    assert quantized_share(model) == pytest.approx(2.5 / 4.5)
    (rest,) = not_quantized(model)
    assert rest.modules == ("0", "1") and rest.operation == "mm" and rest.share == pytest.approx(2 / 4.5)
    assert (
        "multiply-accumulates with both operands quantized: 56 %\nnot quantized, or one operand alone:\n  mm in 2"
        in summary(model)
    )
    save(model, tmp_path / "net.pt")
    assert summary(load(tmp_path / "net.pt", network())) == summary(model)
    half = quantize_model(nn.Sequential(nn.Linear(4, 4)), 32, weight_bits=4, example=torch.randn(2, 4))
    assert quantized_share(half) == 0 and [r.modules for r in not_quantized(half)] == [("0",)]
    kept = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 12)), keep=["1"], example=torch.randn(2, 4))
    assert quantized_share(kept) == 0.25


class Leaf(nn.Module):
    """A module that has no modules inside and counts its passes in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(16, 16))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            return x @ self.weight
        return x


def test_products_of_training_alone_are_seen_and_leave_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), Leaf())
    generator = torch.get_rng_state()
    with pytest.warns(QuantizationWarning, match=r"^mm in 2 \(Leaf\), 50 % of .* in training only is not quantized"):
        quantize_model(model, example=A[:, 0])
    assert model[2].calls == 0 and model[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), generator)


def test_operators_of_others_are_of_unknown_extent() -> None:
    offsets = torch.zeros(1, 18, 4, 4)

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torchvision.ops.deform_conv2d(self.layer(x), offsets, torch.ones(4, 4, 3, 3))

    with pytest.warns(QuantizationWarning, match=r"^torchvision\.deform_conv2d in .* itself, of unknown extent is"):
        quantize_model(Deformable(), example=torch.randn(1, 3, 8, 8))
    boxes, scores = torch.rand(3, 4), torch.rand(3)
    assert counted(lambda: torchvision.ops.nms(boxes, scores, 0.5)) == {}


def test_what_the_example_does_not_suffice_for_is_told() -> None:
    class Strict(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training, "targets are needed"
            return super().forward(x)

    (note,) = trace(Strict(nn.Linear(16, 16)), A).notes
    assert note.startswith("what is computed only in training was not traced") and "targets are needed" in note
