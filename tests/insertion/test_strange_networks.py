"""Tests of networks that are assembled, called or traced in unusual ways."""

import copy
import io
import math
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import qat_runner as qat
from qat_runner.insertion import quantized_share
from qat_runner.insertion.insert import QuantizationWarning

X = torch.randn(16, 8)


class Parted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


def test_of_a_network_that_is_quantized_in_part_nothing_is_lost(tmp_path: Path) -> None:
    model = Parted()
    qat.quantize(model.backbone, 4, example=X)
    with pytest.raises(ValueError, match=r"^head\.weight does not belong to the part that was quantized: save the"):
        qat.save(model, tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()
    assert quantized_share(model) is None and "100 %" not in qat.summary(model)
    qat.save(model.backbone, tmp_path / "m.pt")
    again = Parted()
    again.load_state_dict(Parted().state_dict() | {"head.weight": model.head.weight, "head.bias": model.head.bias})
    qat.load(tmp_path / "m.pt", again.backbone)
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_a_forward_that_is_called_itself_is_the_layers() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b.forward(F.relu(self.a.forward(x)))

    assert quantized_share(qat.quantize(Direct(), 3, example=X, first_last_bits=None)) == 1


def test_a_tensor_is_no_list_of_batches() -> None:
    model = qat.quantize(nn.Sequential(nn.Linear(8, 8)), 4, example=X)
    for use in (qat.calibrate, qat.noise_report):
        with pytest.raises(TypeError, match=r"^batches: must be an iterable of batches, not a tensor"):
            use(model, X)
    with pytest.raises(TypeError, match=r"^batches: must be an iterable"):
        qat.freeze(model, "averaged", X)


class Scaled(nn.Module):
    """A network whose forward has arguments that are passed by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0, **others: Any) -> Tensor:
        out: Tensor = scale * self.layer(x)
        return out


class OfNames(UserDict[str, Any]):
    """A mapping that PyTorch does not know, such as the batches of a tokenizer."""


@pytest.mark.parametrize("kind", [dict, OfNames])
def test_arguments_by_name(kind: Any) -> None:
    batch = kind(x=X, scale=2.0, labels=None)
    model = qat.quantize(Scaled(), 4, example=batch, dynamic=False)
    assert qat.calibrate(model, [batch]) == 1 and len(qat.noise_report(model, [batch])) == 2
    qat.calibrate(AveragedModel(model), [batch])  # whose forward takes any arguments
    for wrong, said in ((kind(scale=2.0), "'x'"), (kind(x=X, foo=1), "'foo'")):
        strict = nn.Linear(8, 8) if "foo" in wrong else Scaled()
        wrong = kind(input=X, foo=1) if "foo" in wrong else wrong
        with pytest.raises(TypeError, match=rf"{said}.*; a batch must be .*, or a dict of them by name"):
            qat.quantize(strict, 4, example=wrong)


@dataclass
class Given:
    x: Tensor
    more: list[Tensor]


@pytest.mark.parametrize("given", [Given(X, [X]), OfNames(x=X, more=[X]), {"x": X, "more": [X]}])
def test_inputs_of_any_kind_are_left_unchanged(given: Any) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, given: Any) -> Tensor:
            x, (same,) = (given.x, given.more) if isinstance(given, Given) else (given["x"], given["more"])
            assert x is same
            out: Tensor = self.layer(x.add_(1))
            return out

    before = X.clone()
    qat.quantize(Writing(), 4, example=given)
    assert torch.equal(X, before)


def signs(model: nn.Module) -> dict[str, bool]:
    return {t.name: t.quantizer.format.signed for t in qat.tensors(model)}


def test_an_empty_batch_shows_no_signs() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    expected = {"0.weight": True, "0.input": True, "2.weight": True, "2.input": False}
    assert signs(qat.quantize(network(), 4, example=X[:0])) == expected
    model = qat.quantize(network(), 4)
    model(X[:0])
    assert not any(t.quantizer.decided for t in qat.tensors(model) if t.tensor == "input")
    model(X.abs())
    assert signs(model) == {**expected, "0.input": False}


@pytest.mark.filterwarnings("ignore:.*not quantized")
def test_sparse_inputs_are_passed_on_and_not_quantized() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
            h = torch.sparse.mm(neighbours, self.a(x)).relu_()
            return torch.sparse.mm(neighbours, self.b(h))

    x, neighbours = X.clone(), torch.eye(16).to_sparse()
    model = qat.quantize(Graph(), 4, example=(x, neighbours))
    assert signs(model) == {"a.weight": True, "a.input": True, "b.weight": True, "b.input": False}
    model(x, neighbours).sum().backward()
    with pytest.raises(TypeError, match=r"^a\.input: a sparse_coo tensor cannot be quantized"):
        model.a(X.to_sparse())
    with pytest.raises(TypeError, match=r"^a\.input: a mkldnn tensor cannot be quantized"):
        model.a(X.to_mkldnn())


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors_are_rejected() -> None:
    nested = torch.nested.nested_tensor([X[:2], X[:3]], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"^example: must not be a nested tensor"):
        qat.quantize(nn.Sequential(nn.Linear(8, 2)), 4, example=nested)
    model = qat.quantize(nn.Sequential(nn.Linear(8, 2)), 4, example=X)
    with pytest.raises(TypeError, match=r"^0\.input: a nested tensor cannot be quantized"):
        model(nested)


def test_quantized_in_inference_mode_and_trained_afterwards() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.inference_mode():
        qat.quantize(model, 4, example=X.clone())
        model.eval()(X)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_no_number_agrees_with_itself() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, key_padding_mask=padding)[0]
            return out

    padding = torch.tensor([[False] * 5, [True] * 5])
    qat.quantize(Padded(), 4, example=(torch.randn(2, 5, 8), padding))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_have_no_scalar_are_refused(bad: float) -> None:
    x, model = X.clone(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x[0, 0] = bad
    with pytest.raises(ValueError, match=r"^0\.input: contains NaN or infinity for the example"):
        qat.quantize(model, 4, example=x)
    qat.quantize(model, 4, example=X, dynamic=False)
    with torch.no_grad():
        model[2].weight[0, 0] = bad
        model[0].weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"^0\.weight: .* holds NaN or infinity"):
        qat.calibrate(model, [X])
    qat.remove_quantizers(model)
    for example in (None, X):
        with pytest.raises(ValueError, match=r"^0\.weight: contains NaN or infinity, so"):
            qat.quantize(model, 4, example=example)
        assert not qat.tensors(model)


@pytest.mark.parametrize("batch", [[X, X], {"x": X, "labels": X}, (X, X)])
def test_labels_in_a_batch_are_explained(batch: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    message = r"^Sequential\.forward takes 1 argument \(input\): .*; a batch must be the input .* without labels$"
    with pytest.raises(TypeError, match=message):
        qat.quantize(model, 4, example=batch)


def test_a_buffer_that_the_example_would_set_is_empty_again() -> None:
    class Centred(nn.Module):
        shift: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("shift", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.shift is None:
                self.shift = x.mean(0).detach()
            out: Tensor = self.layer(x - self.shift)
            return out

    model = qat.quantize(Centred(), 4, example=X)
    assert model.shift is None
    model.load_state_dict(Centred().state_dict())


class Stateful(nn.Module):
    """A network that keeps a state in attributes."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.recurrent = nn.Linear(8, 8), nn.Linear(8, 8)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        past = 0 if self.state is None else self.recurrent(self.state)
        self.state = torch.tanh(self.layer(x) + past) * self.calls
        return self.state


class Built(Stateful):
    """A network that creates a layer in its first forward pass."""

    built = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.built:
            self.made, self.built = nn.Linear(8, 8), True
        out: Tensor = self.made(self.layer(x))
        return out


@pytest.mark.filterwarnings("ignore:recurrent is not called")
def test_states_in_attributes_are_restored_and_layers_stay() -> None:
    model = qat.quantize(Stateful(), 4, example=X)
    assert model.state is None and model.calls == 0
    model(X)
    assert model.state is not None
    built = qat.quantize(Built(), 4, example=X)
    assert built.built and "made.weight" in signs(built)


class Sized(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """A module that creates its parameter in the first forward pass, and keeps its size in an attribute."""

    size = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.UninitializedParameter()

    def initialize_parameters(self, x: Tensor) -> None:
        self.size = x.shape[-1]
        self.scale.materialize((self.size,))  # type: ignore[attr-defined]
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * (self.size > 0)


class Normed(nn.Module):
    """A module that sets its parameter from the first batch."""

    set = False

    def __init__(self) -> None:
        super().__init__()
        self.location = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if not self.set:
            self.location.data.copy_(x.mean(0))
            self.set = True
        return x - self.location


class NormedInTraining(Normed):
    """A module that does so only in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x - self.location


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("first", [Sized, Normed, NormedInTraining])
def test_what_the_first_batch_initializes_stays(first: type[nn.Module]) -> None:
    model = qat.quantize(nn.Sequential(first(), nn.Linear(8, 2)), 4, example=X)
    (parameter,) = model.get_submodule("0").parameters()
    assert torch.equal(parameter, torch.ones(8) if first is Sized else X.mean(0))
    model(3 * X + 1)
    assert torch.equal(parameter, torch.ones(8) if first is Sized else X.mean(0))


def test_a_graph_of_fx_is_copied_saved_and_exported(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.layer(x)
            return F.scaled_dot_product_attention(q, q, x)

    x = torch.randn(2, 5, 8)
    graph = torch.fx.symbolic_trace(Attention())
    with pytest.warns(QuantizationWarning, match="^scaled_dot_product_attention in the model itself, 56 % of"):
        qat.quantize(graph, 8, example=x)
    qat.freeze(graph.eval(), "averaged", [x])
    assert torch.equal(copy.deepcopy(graph)(x), graph(x))
    torch.save(graph, io.BytesIO())
    qat.export(graph, tmp_path / "m.pt2", x)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_scripted_parts_stay_as_they_are() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU())), nn.Linear(8, 4))  # type: ignore[no-untyped-call]
    for example in (None, X):
        found = qat.quantize(copy.deepcopy(model), 4, example=example)
        found(X)
        assert quantized_share(found) == 1


def test_under_vmap_a_network_says_what_it_needs() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.vmap(lambda row: F.relu(self.layer(row)))(x)
            return out

    model = qat.quantize(Mapped(), 4)
    with pytest.raises(RuntimeError, match=r"^layer\.input: a dynamic quantizer writes .* transforms of torch\.func"):
        model(X)


def test_embeddings_of_sparse_gradients_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 2))
    ids = torch.randint(0, 10, (4,))
    with pytest.warns(QuantizationWarning, match="^0 has sparse gradients"):
        qat.quantize(model, 4, example=ids, rules=[qat.Rule("*", type="Embedding", bits=4)])
    model(ids).sum().backward()
    assert model[0].weight.grad is not None and model[0].weight.grad.is_sparse


class Product(torch.autograd.Function):
    """A product that keeps its inputs for its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradients[0] @ w.T, x.T @ gradients[0]


class OfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Product.apply(x, self.weight)
        return out


class LinearOfItsOwn(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = Product.apply(input, self.weight.T)
        return out


@pytest.mark.parametrize("module", [OfItsOwn(), LinearOfItsOwn(8, 8)])
def test_gradients_of_ones_own_stay_those_of_what_is_computed(module: nn.Module) -> None:
    """If a custom autograd function were quantized inside, its gradients would be those of its unquantized inputs."""
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(module))
    with pytest.warns(QuantizationWarning, match=r"^mm in 1 .* is not quantized|^1 is a LinearOfItsOwn"):
        qat.quantize(model, 2, example=X, first_last_bits=None)
    assert quantized_share(model) == 0.5
    assert type(model[1]) is type(module)


def test_modules_within_a_function_that_runs_them_again_are_quantized() -> None:
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, run_function: nn.Module) -> Tensor:
            ctx.run_function = run_function
            ctx.save_for_backward(x)
            out: Tensor = run_function(x)
            return out

    class Reversible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(OfPlain(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Again.apply(x, self.block)
            return out

    class OfPlain(OfItsOwn):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert quantized_share(qat.quantize(Reversible(), 2, example=X, first_last_bits=None)) == 1
