"""Activations with one clipping scalar per token."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_runner.exporting.model_export import export
from qat_runner.insertion import calibrate, freeze, noise_report, quantize_model, quantized_tensors
from qat_runner.insertion.own_weights import QuantOwnWeight
from qat_runner.policy import Policy, PolicyError, Rule
from qat_runner.quant import (
    Call,
    IntAffineFormat,
    IntFormat,
    Maximum,
    MseSweep,
    Octav,
    Percentile,
    TokenQuantizer,
    fake_quantize,
    mse,
    octav,
)

METHODS = [Octav(), Maximum(), Percentile(99.0), MseSweep(20)]
OF_LINEAR = {"first_last_bits": None, "activation_granularity": "token"}


@given(
    st.sampled_from([(3,), (0, 4), (5, 0), (2, 7), (2, 3, 5), (1, 2, 3, 8)]),
    st.sampled_from(METHODS),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["int", "unsigned", "affine"]),
    st.booleans(),
)
def test_each_token_as_if_it_were_alone(shape: Any, method: Any, bits: int, kind: str, training: bool) -> None:
    torch.manual_seed(0)
    format = IntAffineFormat(bits) if kind == "affine" else IntFormat(bits, kind == "int")
    q = method.token_quantizer(format).train(training)
    x = torch.randn(shape) * torch.logspace(-2, 2, max(shape[0], 1))[: shape[0]].view(-1, *[1] * (len(shape) - 1))
    out = q(x)
    assert out.shape == x.shape
    for row, got in zip(q.rows(x).split(1), q.rows(out).split(1), strict=True):
        s = q.method.solve(row, format, 0, Call())
        torch.testing.assert_close(got, fake_quantize(row, s, format), rtol=1e-4, atol=1e-7)


def test_what_it_stands_beside_changes_nothing() -> None:
    x = torch.randn(4, 6, 32)
    for method in METHODS:
        q = method.token_quantizer(IntFormat(4), sign_known=True)
        for mode in (True, False):
            q.train(mode)
            assert torch.equal(q(x)[1, 2:3], q(x[1, 2:3]))


def test_gradient_is_that_of_each_token() -> None:
    x = torch.randn(3, 5, 16, requires_grad=True)
    q = TokenQuantizer(3, Octav(), gradient="mad")
    weights = torch.randn(x.shape)
    (q(x) * weights).sum().backward()
    rows = x.detach().view(15, 16).requires_grad_()
    (fake_quantize(rows, octav(rows, 3, 0), 3, "mad") * weights.view(15, 16)).sum().backward()
    torch.testing.assert_close(x.grad, rows.grad.view(x.shape))  # type: ignore[union-attr]


def test_a_linear_layer_with_outlying_tokens_has_less_noise() -> None:
    x = torch.randn(2, 8, 64)
    x[:, 0] *= 100
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    found = {}
    for granularity in ("tensor", "token"):
        how = OF_LINEAR | {"activation_granularity": granularity}
        network = quantize_model(copy.deepcopy(model), 4, **how, example=(x,)).eval()
        q = quantized_tensors(network)[1].quantizer
        assert q.granularity == granularity
        network(x)
        found[granularity] = float(mse(x[:, 1:], q(x)[:, 1:]))
        rows = noise_report(network, [x])
        assert {(r.tensor, r.granularity) for r in rows} == {("weight", "tensor"), ("input", granularity)}
    assert found["token"] < found["tensor"] / 10


def test_nothing_of_it_is_constant(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 16)
    model = quantize_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), 4, **OF_LINEAR, example=(x,))
    other = quantize_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), 4, first_last_bits=None, example=(x,))
    other(x)
    before = model(x)
    state = copy.deepcopy(model.state_dict())
    assert calibrate(model, [x]) == 1
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match=r"0\.input has one clipping scalar per token"):
        freeze(model, "averaged", [x])
    assert quantized_tensors(model)[0].quantizer.dynamic  # no quantizer was frozen
    with pytest.raises(ValueError, match=r"0\.input has one clipping scalar per token"):
        export(model, tmp_path / "x.onnx", x)
    freeze(model, layers="*.weight")
    model.load_state_dict(state)
    model.load_state_dict(freeze(other, "running").state_dict())
    q = quantized_tensors(model)[1].quantizer
    assert q.dynamic
    assert not q.has_scalars
    assert q.ready


COLUMNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight first": lambda x, w: w @ x.mT,
    "einsum": lambda x, w: torch.einsum("bct,kc->bkt", x.mT, w),
    "einsum, weight first": lambda x, w: torch.einsum("kc,bct->bkt", w, x.mT),
    "einsum with dots": lambda x, w: torch.einsum("c...t,kc->kt...", x.transpose(0, 2), w),
}
"""Computations by name, from tokens [N, L, C] whose elements do not lie along the last dimension, and [K, C]."""


class Turned(nn.Module):
    """Multiplies by a parameter."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.way = nn.Parameter(torch.randn(6, 8)), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, self.mix)


@pytest.mark.parametrize("name", COLUMNS)
def test_tokens_that_are_columns(name: str) -> None:
    x = torch.randn(2, 5, 8)
    model = quantize_model(Turned(COLUMNS[name]), 4, **OF_LINEAR, example=(x,)).eval()
    layer: Any = model.get_submodule("mix_product")
    assert isinstance(layer, QuantOwnWeight)
    out = model(x)
    by_hand = [fake_quantize(t, octav(t, 4, dim), 4) for t, dim in ((x.view(10, 8), 0), (model.mix.detach(), None))]
    torch.testing.assert_close(out, COLUMNS[name](by_hand[0].view_as(x), by_hand[1]), rtol=1e-4, atol=1e-5)
    assert layer.input_quantizer.latest().shape == (10, 1)


class ByEinsum(nn.Module):
    """Attention over [N, L, C], computed by einsum."""

    def __init__(self, scores: str) -> None:
        super().__init__()
        self.qkv, self.scores_of = nn.Linear(8, 24), scores

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.einsum("bij,bjd->bid", torch.einsum(self.scores_of, q, k).softmax(-1), v)


def test_attention_by_einsum_has_tokens_where_they_lie() -> None:
    x = torch.randn(2, 5, 8)
    how = OF_LINEAR | {"rules": [Rule("*.value", bits=32)]}
    model = quantize_model(ByEinsum("bid,bjd->bij"), 8, **how, example=(x,)).eval()
    outlying = x.clone()
    outlying[0, 4] *= 100
    seen: list[Tensor] = []
    model.get_submodule("scores.key_quantizer").register_forward_hook(lambda q, args, out: seen.append(out))
    model(x), model(outlying)
    assert torch.equal(seen[0][:, :4], seen[1][:, :4]) and not torch.equal(seen[0], seen[1])
    other = quantize_model(ByEinsum("bid,bjc->bij"), 8, **how, example=(x,))
    with pytest.raises(ValueError, match=r"^scores\.query: granularity=token needs products that sum over one of its"):
        other(x)


def test_attention_by_token() -> None:
    x = torch.randn(2, 5, 8)
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = quantize_model(attention, 4, **OF_LINEAR, example=(x,)).eval()
    per = {t.name.rpartition("self_attn.")[2]: t.quantizer for t in quantized_tensors(model) if t.tensor != "weight"}
    assert {name for name, q in per.items() if q.granularity == "tensor"} == {"context.value"}
    with torch.no_grad():
        alone, beside = model(x), model(torch.cat([x, 50 * torch.randn(2, 5, 8)]))
    assert per["scores.key"].latest().shape == (4 * 2 * 5, 1)
    assert per["context.probabilities"].latest().shape == (4 * 2 * 5, 1)
    assert alone.shape == beside[:2].shape
    per["context.value"].enabled = False
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(torch.cat([x, 50 * x]))[:2])
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_tensor_of_three_projections_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.q(x) + self.k(x) + self.v(x)
            return out

    x = torch.randn(16, 16, 64)
    model = quantize_model(Three(), 4, **OF_LINEAR, example=(x,)).train()
    solved: list[torch.Size] = []
    solve = Octav.solve
    monkeypatch.setattr(Octav, "solve", lambda self, x, *how: solved.append(x.shape) or solve(self, x, *how))
    model(x).sum().backward()
    assert solved.count(torch.Size((256, 64))) == 1


def test_compiled_it_is_the_same() -> None:
    x = torch.randn(4, 3, 16)
    model = quantize_model(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)), 4, **OF_LINEAR, example=(x,))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"clipping": "lsq"}, "must be neither static nor learned"),
        ({"dynamic": False}, "must be neither static nor learned"),
        ({"eval_mode": "running"}, "eval_mode must be dynamic"),
        ({"activation_granularity": "channel"}, "activation_granularity='channel': must be one of tensor, token"),
    ],
)
def test_what_is_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Policy.of(4, **({"activation_granularity": "token"} | how))


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Rule("*", granularity="token"), r"0\.weight: granularity=token applies only to input of Linear"),
        (Rule("*.input", "Linear", granularity="token", dynamic=False), "granularity=token: requires dynamic=true"),
        (Rule("*.input", "Conv2d", granularity="token"), r"granularity=token applies only to input of Linear"),
    ],
)
def test_rules_that_are_refused(rule: Rule, match: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(-1, (2, 2, 2)), nn.Conv2d(2, 2, 1))
    with pytest.raises(PolicyError, match=match):
        quantize_model(model, 4, rules=[rule])
