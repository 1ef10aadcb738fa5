"""Two processes against one: the same scalars, the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner import distributed, ranks
from qat_runner.cli.run import HYDRA_VERSION_BASE, config_dir
from qat_runner.config import from_hydra, register
from qat_runner.data.batches import Batch, Shard
from qat_runner.errors import RunError
from qat_runner.experiment import build
from qat_runner.insertion import Policy, quantize_model, quantized_tensors
from qat_runner.quant import IntFormat, maximum, octav
from qat_runner.quant.pool import Processes
from qat_runner.tasks import TASKS
from qat_runner.training.loop import freeze_activations
from tests.training.processes import together


def scalars_of_parts(x: Tensor) -> dict[str, Tensor]:
    part = distributed.shard().samples(x)
    found: dict[str, Tensor] = {}
    for bits in (2, 4, 8):
        for signed in (True, False):
            cold = octav(part, IntFormat(bits, signed), pool=Processes())
            found[f"octav {bits} {signed}"] = cold
            found[f"warm {bits} {signed}"] = octav(
                part, IntFormat(bits, signed), init=cold * 1.3, iterations=6, pool=Processes()
            )
            found[f"rows {bits} {signed}"] = octav(part, IntFormat(bits, signed), dim=1, pool=Processes())
    found["max"] = maximum(part, 4, pool=Processes())
    return found


def test_scalars_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    x = torch.randn(7, 3, 50) * torch.logspace(-3, 3, 7).view(7, 1, 1)
    x[0] = 0  # uneven in every way
    first, second = together(scalars_of_parts, 2, tmp_path, x)
    for name, s in first.items():
        assert torch.equal(s, second[name])
        kind, *rest = name.split()
        if kind == "max":
            expected = maximum(x, 4)
        else:
            expected = octav(x, IntFormat(int(rest[0]), rest[1] == "True"), dim=1 if kind == "rows" else None)
        assert torch.allclose(s, expected, rtol=1e-6), name


def with_static_activations(x: Tensor) -> dict[str, Tensor]:
    model = network(4).train()
    for t in quantized_tensors(model):
        t.quantizer.synchronize = False  # each process sees its own
    for part in x.split(2):
        model(part * (1 + 3 * distributed.shard().rank))
    own = {t.name: t.quantizer.running_s.clone() for t in quantized_tensors(model)}
    freeze_activations(model)
    now = {t.name: t.quantizer.s.clone() for t in quantized_tensors(model)}
    return {f"own {name}": s for name, s in own.items()} | {f"now {name}": s for name, s in now.items()}


def test_static_scalars_are_the_mean_over_processes(tmp_path: Path) -> None:
    first, second = together(with_static_activations, 2, tmp_path, torch.randn(8, 3, 8, 8))
    names = [name.removeprefix("now ") for name in first if name.startswith("now ") and name.endswith("input")]
    assert len(names) == 4
    for name in names:
        assert torch.equal(first[f"now {name}"], second[f"now {name}"])
        assert torch.allclose(first[f"now {name}"], (first[f"own {name}"] + second[f"own {name}"]) / 2)
    assert not torch.equal(first["own 0.input"], second["own 0.input"])


def network(bits: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return quantize_model(model, bits, synchronize=True, example=torch.randn(2, 3, 8, 8))


def train(bits: int, steps: int = 20) -> dict[str, Any]:
    """SGD on whole batches, of which each process has its part; float64, so that no rounding hangs on a sum's order."""
    model, shard = network(bits).double(), distributed.shard()
    distributed.synchronize_batchnorm(model)
    distributed.broadcast(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    first: dict[str, Tensor] = {}
    for step in range(steps):
        x = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(shard.samples(x)), shard.samples(y)).backward()
        distributed.average_gradients(model.parameters())
        optimizer.step()
        if step == 0:
            first = {t.name: t.quantizer.s.clone() for t in quantized_tensors(model)}
    return {"weights": model.state_dict(), "first": first}


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(bits: int, tmp_path: Path) -> None:
    first, second = together(train, 2, tmp_path, bits)
    alone = train(bits)
    for name, s in alone["first"].items():
        assert torch.allclose(first["first"][name], s, rtol=1e-6), name
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])  # weights are the same everywhere
        if value.is_floating_point():
            assert torch.allclose(first["weights"][name], value, rtol=1e-6, atol=1e-8), name


def odds_and_ends() -> dict[str, Any]:
    shard = distributed.shard()
    assert ranks.is_main() == (shard.rank == 0)
    assert distributed.all_reduce_max(shard.rank * 7) == 7
    assert distributed.on_main(lambda: "said") == "said"
    try:
        distributed.on_main(_fail)
    except RunError as error:
        said = str(error)
    totals = TASKS["classification"].totals(torch.device("cpu"))
    totals.add(torch.tensor(float(shard.rank)), torch.eye(5)[: 1 + shard.rank], torch.tensor([0, 4])[: 1 + shard.rank])
    return {"said": said, "gathered": distributed.all_gather(shard.rank), "totals": totals.merged().read()}


def _fail() -> None:
    raise RunError("no")


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    for found in together(odds_and_ends, 2, tmp_path):
        assert found["said"] == "no"
        assert found["gathered"] == [0, 1]
        assert found["totals"]["samples"] == 3
        assert found["totals"]["loss"] == pytest.approx(2 / 3)


def signs() -> dict[str, Any]:
    register()
    with initialize_config_dir(str(config_dir()), version_base=HYDRA_VERSION_BASE):
        small = ["dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=8", "model=resnet20", "backend=eager"]
        config = from_hydra(compose("config", overrides=small))
    model, _ = build(config, None)
    return {t.name: t.quantizer.format.signed for t in quantized_tensors(model)}


def test_all_processes_see_the_same_samples_before_they_begin(tmp_path: Path) -> None:
    first, *others = together(signs, 3, tmp_path)
    assert first["conv1.input"]
    assert all(other == first for other in others)


def test_a_batch_of_fewer_samples_than_parts() -> None:
    batch = Batch((torch.arange(2),), torch.arange(2))
    assert [part.size for part in batch.parts(4)] == [1, 1]


def test_shards_are_a_partition() -> None:
    batch = Batch((torch.arange(7),), torch.arange(7))
    parts = [Shard(rank, 3).samples(batch.targets) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    assert [sum(Shard(rank, 3).owns(number) for rank in range(3)) for number in range(5)] == [1] * 5


@pytest.mark.parametrize("clipping", ["percentile", "mse_sweep"])
def test_what_cannot_be_synchronized_is_refused(clipping: str) -> None:
    with pytest.raises(
        ValueError, match=f"clipping '{clipping}' cannot be synchronized over processes: octav and max can"
    ):
        Policy.of(4, clipping, synchronize=True)


def test_alone_nothing_changes() -> None:
    module = nn.Linear(2, 2)
    module.weight.grad = torch.ones(2, 2)
    distributed.average_gradients(module.parameters())
    distributed.broadcast(module)
    assert torch.equal(module.weight.grad, torch.ones(2, 2))
    assert (
        distributed.shard() == Shard(0, 1) and distributed.all_gather(3) == [3] and distributed.all_reduce_max(5) == 5
    )
