"""Products with parameters of the module that multiplies: mixtures of experts, and plain ones."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.insertion import (
    calibrate,
    freeze,
    full_precision_state_dict,
    load,
    noise_report,
    not_quantized,
    quantize_model,
    quantized_share,
    quantized_tensors,
    remove_quantizers,
    save,
    summary,
)
from qat_runner.insertion.calls import taken_apart
from qat_runner.insertion.insert import QuantizationWarning, quantizers_disabled, weights_together
from qat_runner.insertion.layers import kind_of
from qat_runner.insertion.size import size_mb
from qat_runner.policy import PolicyError, Rule
from qat_runner.quant import Quantizer, fake_quantize, octav
from tests.quant.oracles import octav_by_sorting, quantize_by_hand

E, C, K, TOKENS = 3, 8, 8, 10  # square, so that nothing can be told from sizes
CHOSEN = torch.tensor([0, 2, 2, 0, 0, 2, 0, 0, 2, 2])  # the second expert gets no token
ORDER = CHOSEN.argsort(stable=True)
OFFSETS = CHOSEN.bincount(minlength=E).cumsum(0).to(torch.int32)
X = torch.randn(TOKENS, C, generator=torch.Generator().manual_seed(0))

Way = Callable[[Tensor, Tensor], Tensor]
"""What a module computes with tokens [TOKENS, C] and the weights of experts, [E, K, C] or [E, C, K]."""


def looped(product: Way, skipping: bool) -> Way:
    def compute(x: Tensor, w: Tensor) -> Tensor:
        out = x.new_zeros(TOKENS, K)
        for e in range(E):
            if not skipping or (CHOSEN == e).any():
                out = out.index_add(0, *(at := (CHOSEN == e).nonzero()[:, 0],), product(x[at], w[e]))
        return out

    return compute


def in_order(x: Tensor, w: Tensor) -> Tensor:
    return F.grouped_mm(x[ORDER], w, offs=OFFSETS)[ORDER.argsort()]


WAYS: dict[str, tuple[int, Way]] = {
    "loop of linear": (-1, looped(F.linear, skipping=True)),
    "loop over all": (-1, looped(F.linear, skipping=False)),
    "loop of matmul": (-2, looped(lambda x, w: x @ w, skipping=True)),
    "unbound": (-1, lambda x, w: torch.stack([F.linear(x, one) for one in w]).sum(0)),
    "gathered": (-2, lambda x, w: torch.bmm(x[:, None], w[CHOSEN])[:, 0]),
    "gathered, turned": (-1, lambda x, w: torch.bmm(x[:, None], w.index_select(0, CHOSEN).mT)[:, 0]),
    "weights first": (-1, lambda x, w: torch.bmm(w[CHOSEN], x[..., None]).squeeze(-1)),
    "grouped": (-2, in_order),
    "grouped, turned": (-1, lambda x, w: in_order(x, w.transpose(-2, -1))),
    "einsum": (-2, lambda x, w: torch.einsum("nd,edf->nef", x, w).sum(1)),
    "einsum, turned": (-1, lambda x, w: torch.einsum("...d, efd", x, w).sum(1)),
    "einsum of capacities": (-2, lambda x, w: torch.einsum("ecd,edf->ecf", x.repeat(E, 1, 1), w).sum(0)),
    "broadcast": (-2, lambda x, w: (x @ w).sum(0)),
    "converted": (-1, lambda x, w: F.linear(x, w.contiguous().view(E * K, C)).view(TOKENS, E, K).sum(1)),
}
"""Name -> which dimension of the weight is added up over, and the way."""


class Mixture(nn.Module):
    def __init__(self, way: Way, shape: tuple[int, ...] = (E, K, C)) -> None:
        super().__init__()
        self.way = way
        self.weights = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        self.bias = nn.Parameter(torch.ones(E, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, self.weights) + self.bias[0]


def mixture(name: str, **how: Any) -> nn.Module:
    policy = {"first_last_bits": None, "linear_granularity": "channel", **how}
    return quantize_model(nn.Sequential(Mixture(WAYS[name][1])), 4, example=X, **policy)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    return {t.tensor: t.quantizer for t in quantized_tensors(model)}


def quantized_by_hand(w: Tensor, dim: int, granularity: str) -> Tensor:
    """[E, K, C], each expert, or each of its channels, by itself."""
    rows = w.mT if dim == -2 else w
    s = torch.stack([octav(r, 4, dim=0 if granularity == "channel" else None) for r in rows.detach()])
    q = fake_quantize(rows.detach(), s.reshape(E, -1, 1), 4)
    return q.mT if dim == -2 else q


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_multiply(name: str, granularity: str, tmp_path: Path) -> None:
    dim, way = WAYS[name]
    plain = nn.Sequential(Mixture(way))
    state, expected = copy.deepcopy(plain.state_dict()), plain(X)
    model = mixture(name, linear_granularity=granularity)
    assert [(t.name, t.elements) for t in quantized_tensors(model)][0] == ("0.weights_product.weight", E * K * C)
    assert quantized_share(model) == 1 and full_precision_state_dict(model).keys() == state.keys()
    with quantizers_disabled(model):
        assert torch.equal(model(X), expected)
    q = quantizers(model)
    assert q["weight"].s.shape == ((E * K, 1) if granularity == "channel" else (E, 1))
    model.eval()
    with torch.no_grad():  # inputs are quantized by the calls, so not here
        q["input"].enabled = False
        by_hand = way(X, quantized_by_hand(plain[0].weights, dim, granularity)) + 1
        torch.testing.assert_close(model(X), by_hand, rtol=1e-4, atol=1e-5)
        q["input"].enabled = True
        out = model(X)
        assert not torch.allclose(out, expected)
        assert torch.equal(copy.deepcopy(model)(X), out)
        save(model, tmp_path / "net.pt")
        assert torch.equal(load(tmp_path / "net.pt", nn.Sequential(Mixture(way))).eval()(X), out)
    with weights_together(model.train()).quantized():
        model(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    freeze(model, batches=[X]).eval()
    assert torch.isfinite(model(X)).all()
    model.load_state_dict(state)
    remove_quantizers(model)
    assert torch.equal(model(X), expected) and type(model[0]) is Mixture and model.state_dict().keys() == state.keys()
