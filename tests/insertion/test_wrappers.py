"""Tests of quantized networks inside wrappers of other libraries, and of their state dicts."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.parallel import DistributedDataParallel

import qat_runner as qat
from qat_runner.exporting.formats import read_program
from qat_runner.insertion import (
    Rule,
    calibrate,
    freeze,
    full_precision_state_dict,
    load,
    noise_report,
    quantize_model,
    quantized_share,
    quantized_tensors,
    remove_quantizers,
    save,
    summary,
    trace,
)
from qat_runner.insertion.insert import wanted
from tests.insertion.test_own_weights import WAYS, Mixture, Two
from tests.insertion.test_own_weights import X as TOKENS

X = torch.randn(4, 3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def quantized() -> nn.Module:
    return quantize_model(network(), example=X)


def frozen() -> nn.Module:
    return freeze(quantized(), batches=[X]).eval()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Twice(nn.Module):
    """A network that has one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Sequential(self.a, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


@pytest.mark.filterwarnings("ignore:.*is called 2 times")
def test_a_layer_of_two_names(tmp_path: Path) -> None:
    x = torch.randn(2, 16)
    model = quantize_model(Twice(), example=x).eval()
    Twice().load_state_dict(full_precision_state_dict(model))
    save(model, tmp_path / "twice.pt")
    assert torch.equal(load(tmp_path / "twice.pt", Twice()).eval()(x), model(x))


def test_versions_stay_in_a_state_dict() -> None:
    model = torchvision.models.mnasnet0_5(num_classes=10)
    quantize_model(model, example=torch.randn(2, 3, 32, 32))
    torchvision.models.mnasnet0_5(num_classes=10).load_state_dict(full_precision_state_dict(model))


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.embedding(x))
            return y

    model = quantize_model(Tied(), example=torch.arange(6)[None])
    assert model.head.weight is model.embedding.weight
    Tied().load_state_dict(full_precision_state_dict(model))


def test_saved_whole() -> None:
    model, file = quantized().eval(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), model(X)) and summary(again) == summary(model)


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    model = DistributedDataParallel(quantized())
    model(X).sum().backward()
    assert quantized_share(model) == 1 and len(quantized_tensors(model)) == 6
    network().load_state_dict(full_precision_state_dict(model))
    save(model, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", network()).eval()(X), model.eval()(X))
    noise_report(freeze(model, batches=[X]), [X])


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use what PyTorch deprecates
@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel, compiled, compiled_in_place])
def test_a_network_that_is_wrapped_first(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model, plain = (quantize_model(m, 4, example=X, rules=[Rule("2.*", bits=3)]) for m in (wrap(network()), network()))
    assert summary(model) == summary(plain) and [*trace(model, X).layers] == [*trace(plain, X).layers]
    assert full_precision_state_dict(model).keys() == full_precision_state_dict(plain).keys()
    assert [t.name for t in quantized_tensors(model)] == [t.name for t in quantized_tensors(plain)]
    assert [wanted(model, t).bits for t in quantized_tensors(model) if t.layer == "2"] == [3, 3]
    for one in (model, plain):
        one(X).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert noise_report(model, [X]) == noise_report(plain, [X])
    calibrate(model, [X], layers="2.*")
    freeze(model, batches=[X], layers=["0", "2.*"])
    freeze(model, batches=[X]).eval()
    expected = freeze(plain, batches=[X]).eval()(X)
    torch.testing.assert_close(model(X), expected)
    save(model, tmp_path / "net.pt")
    for again in (network(), wrap(network())):
        assert torch.equal(load(tmp_path / "net.pt", again).eval()(X), expected)
    assert torch.equal(qat.export(model, tmp_path / "net.pt2", X)(X), expected)
    assert not quantized_tensors(remove_quantizers(model))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use what PyTorch deprecates
def test_compiled_blocks(tmp_path: Path) -> None:
    model = nn.Sequential(compiled(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), compiled(nn.Linear(8, 4)))
    x = torch.randn(4, 8)
    quantize_model(model, 4, example=x)
    calibrate(model, [x])
    freeze(model, batches=[x]).eval()
    expected = model(x)
    integers = qat.export(model, tmp_path / "net.pt2", x)
    assert torch.equal(integers(x), expected) and type(integers.get_submodule("0")) is nn.Sequential
    torch.testing.assert_close(read_program(tmp_path / "net.pt2")(x)[0], expected)
    assert torch.equal(model(x), expected)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older compilers use what PyTorch deprecates
def test_a_class_whose_forward_is_compiled(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    model = quantize_model(Attending(), 4, example=x)
    assert quantized_share(model) == 1
    model(x).sum().backward()
    freeze(model, batches=[x]).eval()
    qat.export(model, tmp_path / "net.pt2", x)
    torch.testing.assert_close(read_program(tmp_path / "net.pt2")(x)[0], model(x))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("layers", [True, False])
def test_fully_sharded(layers: bool, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, plain = quantized(), quantized()
    for layer in (model[0], model[2], model[5]) if layers else ():
        fully_shard(layer)
    fully_shard(model)
    out, expected = model(X), plain(X)
    assert torch.equal(out, expected)
    out.square().mean().backward()
    expected.square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad.full_tensor(), q.grad)  # type: ignore[union-attr]
    assert len(quantized_tensors(model)) == 6 and quantized_share(model) == 1
    calibrate(model, [X])
    freeze(model, batches=[X])
    freeze(plain, batches=[X])
    save(model, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", network()).eval()(X), model.eval()(X))
    with pytest.raises(ValueError, match=r"^the network is sharded over processes: export one that `load` restores"):
        qat.export(model, tmp_path / "net.pt2", X)
    if layers:
        with pytest.raises(ValueError, match="was changed to FSDPQuantConv2d"):
            remove_quantizers(model)
        assert len(quantized_tensors(model)) == 6


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_own_weights_fully_sharded(granularity: str, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Mixture(WAYS["gathered"][1]), Two())

    model, plain = (quantize_model(network(), linear_granularity=granularity, example=TOKENS) for _ in range(2))
    fully_shard(model[1])  # type: ignore[index]
    fully_shard(model)
    for one in (model, plain):
        one(TOKENS).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad.full_tensor(), q.grad)  # type: ignore[union-attr]
    for one in (model, plain):
        calibrate(one, [TOKENS])
        freeze(one, batches=[TOKENS]).eval()
    assert torch.equal(model(TOKENS), plain(TOKENS))
    save(model, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", network()).eval()(TOKENS), plain(TOKENS))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by jvp itself
@pytest.mark.parametrize("make", [quantized, frozen])
def test_transforms_of_torch_func(make: object) -> None:
    model = make().eval()  # type: ignore[operator]
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().mean()

    assert torch.equal(functional_call(model, parameters, (X,)), model(X))
    loss(parameters, X).backward()
    for name, found in grad(loss)(parameters, X).items():
        torch.testing.assert_close(found, parameters[name].grad)
    several = torch.randn(3, *X.shape)
    with torch.no_grad():
        torch.testing.assert_close(vmap(model)(several), torch.stack([model(x) for x in several]))
    with pytest.raises(RuntimeError, match=r"forward-mode derivatives \(jvp\) are not supported"):
        jvp(model, (X,), (X,))


def test_what_torch_func_cannot_do_is_a_sentence() -> None:
    model = quantized()
    with pytest.raises(RuntimeError, match=r"^0\.input: a dynamic quantizer writes to its buffers"):
        vmap(model)(X[None])


@pytest.mark.parametrize("make", [quantized, frozen])
def test_exported_programs(make: object) -> None:
    model = make().eval()  # type: ignore[operator]
    program, file = torch.export.export(model, (X,)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(X), model(X))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [quantized, frozen])
def test_a_trace_of_torchscript(make: object) -> None:
    """Tracing reads every attribute of every module, also of those that have not been called: tools that count
    operations or draw the graph do this, such as `SummaryWriter.add_graph`."""
    model = make().eval()  # type: ignore[operator]
    traced = torch.jit.trace(model, X)  # type: ignore[no-untyped-call]
    other = torch.randn(3, *X.shape[1:])
    assert torch.equal(traced(other), model(other))


def test_an_example_without_numbers() -> None:
    with torch.device("meta"):
        model, x = network(), torch.empty(4, 3, 8, 8)
    quantize_model(model, example=x)
    assert quantized_share(model) == 1
    assert [t.quantizer.format.signed for t in quantized_tensors(model) if t.tensor == "input"] == [True, False, False]
    here = model.to_empty(device="cpu")
    here.load_state_dict(quantized().state_dict())
    assert here(X).isfinite().all()


def test_a_detector() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    with pytest.warns(Warning, match="only in training was not traced, since the example is not sufficient"):
        quantize_model(model, example=([torch.rand(3, 64, 64)],))
    assert quantized_share(model) == 1


def test_adapters_on_top() -> None:
    import peft  # slow to import

    model = copy.deepcopy(quantized())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["5"], r=2))
    adapted(X).square().mean().backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)
    assert {t.tensor for t in quantized_tensors(adapted)} == {"weight", "input"}
