"""Tests of products with parameters of the module that multiplies: mixtures of experts, and single matrices."""

import copy
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
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
from qat_runner.insertion.calls import parse_call
from qat_runner.insertion.insert import QuantizationWarning, quantizers_disabled, weights_together
from qat_runner.insertion.layers import kind_of
from qat_runner.insertion.size import size_mb
from qat_runner.policy import Rule
from qat_runner.quant import Octav, Quantizer, fake_quantize, octav
from tests.quant.oracles import octav_by_sorting, quantize_by_hand

E, C, K, TOKENS = 3, 8, 8, 10  # square, so that sizes reveal nothing
CHOSEN = torch.tensor([0, 2, 2, 0, 0, 2, 0, 0, 2, 2])  # the second expert gets no token
ORDER = CHOSEN.argsort(stable=True)
OFFSETS = CHOSEN.bincount(minlength=E).cumsum(0).to(torch.int32)
X = torch.randn(TOKENS, C, generator=torch.Generator().manual_seed(0))

Way = Callable[[Tensor, Tensor], Tensor]
"""What a module computes from tokens [TOKENS, C] and the weights of experts, [E, K, C] or [E, C, K]."""


def looped(product: Way, skipping: bool) -> Way:
    def compute(x: Tensor, w: Tensor) -> Tensor:
        out = x.new_zeros(TOKENS, K)
        for e in range(E):
            if not skipping or (e == CHOSEN).any():
                out = out.index_add(0, *(at := (e == CHOSEN).nonzero()[:, 0],), product(x[at], w[e]))
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
"""Name -> the dimension of the weight that is summed over, and the way to multiply."""


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
    """Quantize [E, K, C], each expert, or each of its channels, by itself."""
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
    assert next((t.name, t.elements) for t in quantized_tensors(model)) == ("0.weights_product.weight", E * K * C)
    assert quantized_share(model) == 1 and full_precision_state_dict(model).keys() == state.keys()
    with quantizers_disabled(model):
        assert torch.equal(model(X), expected)
    q = quantizers(model)
    assert q["weight"].s.shape == ((E * K, 1) if granularity == "channel" else (E, 1))
    assert q["weight"].granularity == ("channel" if granularity == "channel" else "expert")
    model.eval()
    with torch.no_grad():  # inputs are quantized in the calls, so not here
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


def test_gradients_by_hand() -> None:
    """Gradients of experts in float64 agree with the estimators' formulas and with OCTAV by sorting."""
    torch.manual_seed(0)
    x, w, g = torch.randn(E, 5, C).double(), torch.randn(E, C, K).double(), torch.randn(E, 5, K).double()
    x[1] = 0  # an expert whose slots are all empty
    model = Mixture(lambda x, w: torch.einsum("ecd,edf->ecf", x, w)).double()
    model.weights.data = w.clone()
    quantize_model(model, 4, linear_granularity="channel", first_last_bits=None, example=x).eval()
    given = x.clone().requires_grad_()
    (model(given) * g).sum().backward()
    k = 4.0**-4 / 3
    reach = octav_by_sorting(x.flatten(), k)
    quantized_x = quantize_by_hand(x, reach, 4, signed=True)
    of_x, of_w = torch.zeros_like(x), torch.zeros_like(w)
    for e in range(E):
        for f in range(K):
            column = w[e, :, f]
            s = octav_by_sorting(column, k)
            of_x[e] += g[e, :, f, None] * quantize_by_hand(column, s, 4, signed=True)
            passed = torch.where(column.abs() <= s, 1.0, s / column.abs())
            of_w[e, :, f] = passed * (quantized_x[e] * g[e, :, f, None]).sum(0)
    torch.testing.assert_close(model.weights.grad, of_w, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(given.grad, of_x * (x.abs() <= reach), rtol=1e-5, atol=1e-8)
    assert not model.weights.grad[1].any()


def decoder(kind: str, implementation: str) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes, **heads, head_dim=8)).eval()
    model.set_experts_implementation(implementation)
    model.set_attn_implementation("eager")
    return model


IDS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])  # [E, K, C] and [E, C, K], the latter with biases
def test_experts_of_transformers(kind: str, implementation: str) -> None:
    model = decoder(kind, implementation)
    with torch.no_grad():
        plain = model(IDS).last_hidden_state
        quantize_model(model, 4, linear_granularity="channel", example=IDS)
        assert quantized_share(model) == 1 and not_quantized(model) == []
        with quantizers_disabled(model):
            assert torch.equal(model(IDS).last_hidden_state, plain)
    assert {t.layer for t in quantized_tensors(model) if kind_of(model.get_submodule(t.layer)) == "Experts"} == {
        f"layers.0.mlp.experts.{name}_product" for name in ("gate_up_proj", "down_proj")
    }
    model.train()(IDS).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    freeze(model, batches=[IDS]).eval()
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
        for other in IMPLEMENTATIONS:  # with constant scalars, all of them round the same way
            model.set_experts_implementation(other)
            torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    decoder(kind, implementation).load_state_dict(full_precision_state_dict(model))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled_experts(implementation: str) -> None:
    model = quantize_model(decoder("Mixtral", implementation), example=IDS)
    experts = model.layers[0].mlp.experts
    given = torch.randn(16, 16), torch.randint(0, 4, (16, 2)), torch.rand(16, 2)
    twin = torch.compile(copy.deepcopy(experts), backend="eager", fullgraph=True)
    torch.testing.assert_close(twin(*given), experts(*given))


def gradients(model: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    found = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    return list(found)


@pytest.mark.parametrize("clipping", ["octav", "lsq"])
@pytest.mark.parametrize("more", [{}, {"linear_granularity": "tensor"}, {"weight_format": "int_affine"}])
@pytest.mark.parametrize("name", ["loop of linear", "loop of matmul", "gathered", "grouped", "einsum, turned"])
def test_quantized_weights_are_not_kept(
    name: str, more: dict[str, Any], clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Octav(warm_iterations=None) if clipping == "octav" else clipping  # finds the same scalars each time
    model = mixture(name, clipping=method, **more)
    calibrate(model, [X])
    made: list[StorageWeakRef] = []
    layer = model[0].weights_product

    def noted(*tensors: Tensor) -> None:
        others = [t for t in tensors if t.data_ptr() != model[0].weights.data_ptr()]
        made.extend(StorageWeakRef(t.untyped_storage()) for t in others)

    handle = layer.weight_quantizer.register_forward_hook(lambda q, args, out: noted(*args, out))
    handle_of_product = layer.register_forward_hook(lambda m, args, out: noted(args[3].weight))
    out = model(X.clone().requires_grad_())  # so that weights are kept for its gradient
    assert made and all(one.expired() for one in made)
    handle.remove()
    handle_of_product.remove()
    del out
    remade = gradients(model)
    monkeypatch.setattr("qat_runner.insertion.own_weights.saving", lambda: False)
    for a, b in zip(gradients(model), remade, strict=True):
        torch.testing.assert_close(a, b)


def test_an_expert_without_tokens_does_no_harm() -> None:
    model, plain = mixture("loop over all", dynamic=False), mixture("loop of linear", dynamic=False)
    for network in (model, plain):
        assert calibrate(network, [X]) == 1
    for name, q in quantizers(model).items():
        assert torch.equal(q.s, quantizers(plain)[name].s) and (q.s > 0).all()
    assert torch.equal(model(X), plain(X))
    model, plain = mixture("loop over all"), mixture("loop of linear")
    for network in (model, plain):
        for _ in range(3):
            network(X).square().sum().backward()
    assert torch.equal(model(X), plain(X)) and not model[0].weights.grad[1].any()
    assert torch.equal(quantizers(model)["input"].running_s, quantizers(plain)["input"].running_s)


def test_what_no_batch_reaches_is_named() -> None:
    mixed = mixture("loop of linear", dynamic=False)
    mixed[0].way = lambda x, w: x
    with pytest.warns(QuantizationWarning, match=r"^0\.weights_product\.input: not reached by any calibration batch"):
        calibrate(mixed, [X])
    assert (quantizers(mixed)["weight"].s > 0).all()


class Two(nn.Module):
    """A model with experts and a single matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.matrix = nn.Parameter(torch.randn(E, K, C)), nn.Parameter(torch.randn(C, 4))

    def forward(self, x: Tensor) -> Tensor:
        return WAYS["gathered, turned"][1](x, self.experts) @ self.matrix


def test_rules_by_type_and_by_name(tmp_path: Path) -> None:
    rules = [Rule("*", "Experts", bits=3), Rule("matrix_product.input", bits=5)]
    model = quantize_model(Two(), 4, first_last_bits=None, linear_granularity="channel", rules=rules, example=X)
    bits = {t.name: (t.quantizer.format.bits, *t.quantizer.s.shape) for t in quantized_tensors(model)}
    assert bits == {
        "experts_product.weight": (3, E * K, 1),
        "experts_product.input": (3,),
        "matrix_product.weight": (4, 4, 1),
        "matrix_product.input": (5,),
    }
    small, full = size_mb(model)
    scalars = E * K + 1 + 4 + 1
    assert full == 4 * (E * K * C + C * 4) / 1e6
    assert small == pytest.approx((3 * E * K * C + 4 * C * 4 + 32 * scalars) / 8e6)
    assert "in full precision" not in summary(model) and {row.layer for row in noise_report(model, [X])} == {
        "experts_product",
        "matrix_product",
    }


@pytest.mark.parametrize("clipping", ["lsq", "pact", "max", "mse_sweep"])
@pytest.mark.parametrize("more", [{}, {"weight_format": "int_affine"}, {"weight_range": "oriented"}])
def test_other_methods_and_formats(clipping: str, more: dict[str, Any]) -> None:
    if clipping == "pact" and more:
        return
    torch.manual_seed(0)
    model = quantize_model(Two(), 6, clipping, linear_granularity="channel", example=X, **more)
    with quantizers_disabled(model):
        plain = model(X)
    calibrate(model, [X])
    out = model(X)
    out.square().sum().backward()
    assert clipping == "pact" or (out - plain).norm() < 0.2 * plain.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_a_rule_leaves_alone_is_as_before(tmp_path: Path) -> None:
    model = quantize_model(Two(), rules=[Rule("experts_*", bits=32)], example=X)
    assert [t.layer for t in quantized_tensors(model)] == ["matrix_product"] * 2
    assert [r.modules for r in not_quantized(model)] == [("experts_product",)]
    save(model, tmp_path / "net.pt")
    again = load(tmp_path / "net.pt", Two())
    assert torch.equal(again.eval()(X), model.eval()(X)) and summary(again) == summary(model)
    model = quantize_model(
        nn.Sequential(nn.Linear(C, C), Two()), keep=["1.experts_product", "1.matrix_product"], example=X
    )
    assert type(model[1]) is Two


def test_what_does_not_fit_stays_and_is_named() -> None:
    ways: dict[str, Way] = {
        "over experts": lambda x, w: torch.einsum("nd,edf->nf", x, w),
        "the first dimension": lambda x, w: x[:, :E] @ w[:, 0],
        "both": lambda x, w: x @ w[0] + F.linear(x, w[0]),
        "computed": lambda x, w: x @ (w[0] + 1),
        "with itself": lambda x, w: x + (w[0] @ w[1])[0],
    }
    for name, way in ways.items():
        with pytest.warns(QuantizationWarning, match=r"in 1 \(Mixture\), .* is not quantized: only"):
            model = quantize_model(nn.Sequential(nn.Linear(C, C), Mixture(way)), example=X)
        assert type(model[1]) is Mixture, name
    taken = Two()
    taken.matrix_product = 3  # type: ignore[assignment]
    with pytest.warns(QuantizationWarning, match="^mm in the model itself, .* is not quantized"):
        assert len(quantized_tensors(quantize_model(taken, example=X))) == 2


class Table(nn.Module):
    """A module that looks up rows of a parameter, [9, C], and also multiplies by it."""

    def __init__(self, used: Callable[[nn.Module, Tensor], Tensor], product: Way = F.linear) -> None:
        super().__init__()
        self.table, self.layer, self.used, self.product = (
            nn.Parameter(torch.randn(9, C)),
            nn.Linear(C, C),
            used,
            product,
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.product(self.layer(self.used(self, ids)), self.table)


LOOK_UPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in a layer": lambda module, ids: module.table[ids],
    "before it is added to": lambda module, ids: module.table[ids] + 1,
    "by embedding": lambda module, ids: F.embedding(ids, module.table),
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_a_parameter_that_is_looked_up_as_well(name: str) -> None:
    ids, seen = torch.arange(9), []
    with pytest.warns(QuantizationWarning, match=r"^(mm|addmm) in the model itself, .* is not quantized"):
        model = quantize_model(Table(LOOK_UPS[name]), 2, example=ids)
    assert {t.layer for t in quantized_tensors(model)} == {"layer"}
    model.layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.eval()(ids)
    assert torch.equal(seen[0], LOOK_UPS[name](model, ids))


def test_a_parameter_of_a_module_inside() -> None:
    """A parameter of a module inside counts as the outer module's own, too, if the outer one runs around it."""
    model = Table(lambda module, ids: module.layer.weight[ids])
    model.table = model.layer.weight
    with pytest.warns(QuantizationWarning, match=r"^(mm|addmm) in the model itself, .* is not quantized"):
        quantize_model(model, example=torch.arange(C))
    assert {t.name for t in quantized_tensors(model)} == {"layer.weight", "layer.input"}


def test_a_parameter_that_is_added_to_the_product_by_it() -> None:
    model = Table(lambda module, x: x, lambda x, w: F.linear(x, w, w[:, 0]))
    with pytest.warns(QuantizationWarning, match=r"^(mm|addmm) in the model itself, .* is not quantized"):
        quantize_model(model, example=X)
    assert {t.layer for t in quantized_tensors(model)} == {"layer"}


def test_a_parameter_that_is_asked_for_its_shape() -> None:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w[:]) + x.new_zeros(w[:].shape[0]) + w[:].new_ones(9) + torch.zeros_like(w[:, 0])

    model = quantize_model(Table(lambda module, x: x, product), example=X)
    assert {t.layer for t in quantized_tensors(model)} == {"layer", "table_product"}


def test_saved_whole() -> None:
    model, file = quantize_model(Two(), example=X).eval(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), model(X)) and summary(again) == summary(model)
    remove_quantizers(again)
    assert type(again) is Two


def test_an_example_without_numbers() -> None:
    for name in ("gathered", "gathered, turned", "einsum"):
        dim, way = WAYS[name]
        here = quantize_model(Mixture(way), linear_granularity="channel", example=X)
        with torch.device("meta"):
            model = Mixture(lambda x, w, way=way: way(x, w))  # type: ignore[misc]
        quantize_model(model, linear_granularity="channel", example=X.to("meta"))
        assert model.weights_product.contracted == here.weights_product.contracted == dim
        assert model.state_dict().keys() == here.state_dict().keys()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save(quantize_model(Two(), example=X), path)
    with pytest.raises(ValueError, match="Linear has no parameter experts that could be quantized"):
        load(path, nn.Linear(C, C))
    content = torch.load(path, weights_only=True)
    for wrong in ([], {"experts": 0}, {1: -1}):
        torch.save({**content, "contracted": wrong}, path)
        with pytest.raises(ValueError, match="contracted must be a dict of names to -1 or -2"):
            load(path, Two())


def test_what_einsum_adds_up_over() -> None:
    def summed(equation: str, *dims: int) -> tuple[int, int] | None:
        call = parse_call(torch.einsum, (equation, *(torch.ones([1] * n) for n in dims)), {})
        assert call is not None
        return call.summed

    assert summed("ecd, edf -> ecf", 3, 3) == (-1, -2)
    assert summed("bid,bjd->bij", 3, 3) == (-1, -1)
    assert summed("...d,efd", 4, 3) == (-1, -1)
    assert summed("...dx,d...->...x", 3, 2) == (-2, -2)
    assert (
        summed("nd,edf->nf", 2, 3) is None and summed("nd,df->ndf", 2, 2) is None and summed("nde,de->n", 3, 2) is None
    )


def test_several_passes_have_one_quantization() -> None:
    model = mixture("loop of matmul")
    model(X)
    freeze(model, batches=[X]).train()
    given = X, X.flip(0)
    for x in given:
        model(x).square().sum().backward()
    apart = [p.grad for p in model.parameters()]
    model.zero_grad()
    with weights_together(model).quantized(passes=2):
        for x in given:
            model(x).square().sum().backward()
    for a, p in zip(apart, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a)


def test_what_parametrizes_a_weight_comes_first() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = mixture("einsum")
    nn.utils.parametrize.register_parametrization(model[0], "weights", Twice())
    with pytest.raises(RuntimeError, match=r"^weights of a quantized Mixture is now recomputed at each use"):
        model(X)


class Tree(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.matrix = nn.Linear(C, C), nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self(x, depth - 1) if depth else self.layer(x)
        return (x @ self.matrix.T).relu()


def test_a_module_that_calls_itself_is_left_alone() -> None:
    with pytest.warns(QuantizationWarning, match=r"^mm in the model itself, .* is not quantized"):
        model = quantize_model(Tree(), example=X)
    assert {t.layer for t in quantized_tensors(model)} == {"layer"}


class Both(nn.Module):
    """A module with a product with its own parameter and with PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.attention = nn.Parameter(torch.randn(C, C)), nn.MultiheadAttention(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.matrix
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def test_replicas_multiply_by_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas, made as by nn.DataParallel, use their own parameters, which are different here to tell them apart."""
    model: Any = quantize_model(Both(), 2, first_last_bits=None, example=X).eval()
    module = importlib.import_module("torch.nn.parallel.replicate")

    def sent(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[2 * t if t.requires_grad else t.clone() for t in tensors]]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", sent)
    replica = module.replicate(model, [0])[0]
    used = {}
    for name in ("matrix_product", "attention.query_projection", "attention.value_projection"):
        quantizer = replica.get_submodule(name).weight_quantizer
        quantizer.register_forward_hook(lambda q, args, out, name=name: used.update({name: args[0]}))
    replica(X)
    assert torch.equal(used["matrix_product"], 2 * model.matrix)
    assert torch.equal(used["attention.value_projection"], 2 * model.attention.in_proj_weight[2 * C :])
    assert len(used) == 3 and torch.equal(model.matrix_product.weight, model.matrix)
