"""Several processes give the same clipping scalars and the same weights as one."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner import distributed, ranks
from qat_runner.cli.run import HYDRA_VERSION_BASE, config_dir
from qat_runner.config import from_hydra, register
from qat_runner.data.batches import Batch, Shard
from qat_runner.errors import ConfigError, RunError
from qat_runner.experiment import build
from qat_runner.insertion import Policy, calibrate, quantize_model, quantized_tensors
from qat_runner.insertion.insert import weights_together
from qat_runner.quant import IntFormat, maximum, octav
from qat_runner.quant.pool import Processes
from qat_runner.tasks import TASKS
from qat_runner.training.batch_norm import reestimate
from qat_runner.training.freezing import freeze_activations
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


def uneven() -> Tensor:
    """Return a tensor whose rows differ in scale; one row is zero."""
    x = torch.randn(7, 3, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7).view(7, 1, 1)
    x[0] = 0
    return x


def scalars_are_those_of_the_whole_batch(two: list[dict[str, Any]]) -> None:
    x = uneven()
    first, second = (found["scalars"] for found in two)
    for name, s in first.items():
        assert torch.equal(s, second[name])
        kind, *rest = name.split()
        if kind == "max":
            expected = maximum(x, 4)
        else:
            expected = octav(x, IntFormat(int(rest[0]), rest[1] == "True"), dim=1 if kind == "rows" else None)
        assert torch.allclose(s, expected, rtol=1e-6), name


def with_static_activations() -> dict[str, Tensor]:
    model, x = network(4).train(), torch.randn(8, 3, 8, 8)
    for t in quantized_tensors(model):
        t.quantizer.synchronize = False  # each process sees its own
    for part in x.split(2):
        model(part * (1 + 3 * distributed.shard().rank))
    own = {t.name: t.quantizer.running_s.clone() for t in quantized_tensors(model)}
    freeze_activations(model)
    now = {t.name: t.quantizer.s.clone() for t in quantized_tensors(model)}
    return {f"own {name}": s for name, s in own.items()} | {f"now {name}": s for name, s in now.items()}


def static_scalars_are_the_mean_over_processes(two: list[dict[str, Any]]) -> None:
    first, second = (found["static"] for found in two)
    names = [name.removeprefix("now ") for name in first if name.startswith("now ") and name.endswith("input")]
    assert len(names) == 4
    for name in names:
        assert torch.equal(first[f"now {name}"], second[f"now {name}"])
        assert torch.allclose(first[f"now {name}"], (first[f"own {name}"] + second[f"own {name}"]) / 2)
    assert not torch.equal(first["own 0.input"], second["own 0.input"])


def with_statistics_anew() -> dict[str, Tensor]:
    """Re-estimate BatchNorm on a batch of four samples per process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    part = distributed.shard().samples(torch.randn(8, 3, 8, 8))
    reestimate(model, [Batch((part,), torch.zeros(len(part)))], lambda m, inputs: m(*inputs))
    return {"mean": model[1].running_mean, "var": model[1].running_var, "of": model[0](part)}


def statistics_are_the_mean_over_processes(two: list[dict[str, Any]]) -> None:
    first, second = (found["statistics"] for found in two)
    assert not torch.equal(first["of"], second["of"])
    for name, dims in {"mean": torch.mean, "var": torch.var}.items():
        expected = (dims(first["of"], (0, 2, 3)) + dims(second["of"], (0, 2, 3))) / 2
        assert torch.equal(first[name], second[name]) and torch.allclose(first[name], expected, atol=1e-6)


class Idle(nn.Sequential):
    """A network with a parameter that is never used."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.idle = nn.Parameter(torch.ones(3))


def network(bits: int, **policy: Any) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = Idle(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    example = torch.randn(2, 3, 8, 8)
    quantize_model(model, bits, example=example, **{"synchronize": True, **policy})
    if not all(t.quantizer.ready for t in quantized_tensors(model)):
        calibrate(model, [example])
    return model


def train(
    bits: int, batch: int = 16, steps: int = 20, parts: int = 1, freeze_at: int | None = None, **policy: Any
) -> dict[str, Any]:
    """Train by SGD on batches split over the processes, in float64 so that quantization does not depend on sum order.

    Args:
        batch: samples per step.
        parts: number of parts in which each process computes its share, accumulating gradients.
        freeze_at: step before which the activations' scalars become static.
    """
    model, shard = network(bits, **policy).double(), distributed.shard()
    distributed.synchronize_batchnorm(model)
    distributed.broadcast(model)
    trained: nn.Module = model
    weights = weights_together(model, bucket=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    first: dict[str, Tensor] = {}
    for step in range(steps):
        x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (batch,), generator=generator)
        optimizer.zero_grad()
        if step == freeze_at:
            freeze_activations(model)
        with weights.quantized(parts):
            pieces = list(zip(shard.samples(x).chunk(parts), shard.samples(y).chunk(parts), strict=True))
            for i, (images, classes) in enumerate(pieces):
                with distributed.accumulating(trained) if i < parts - 1 else nullcontext():
                    (F.cross_entropy(trained(images), classes) / parts).backward()
        if step == 0:
            trained = distributed.data_parallel(model)
        optimizer.step()
        if step == 0:
            first = {t.name: t.quantizer.s.clone() for t in quantized_tensors(model)}
    return {"weights": model.state_dict(), "first": first}


CASES: dict[str, dict[str, Any]] = {
    "synchronized": {},
    "in parts": {"parts": 2, "clipping": "max"},
    "static": {"dynamic": False, "synchronize": False},
    "learned": {"clipping": "lsq", "synchronize": False},
    "frozen": {"freeze_at": 3},
    "frozen, affine": {"freeze_at": 3, "clipping": "max", "activation_format": "int_affine"},
    "oriented": {"clipping": "max", "range": "oriented"},
    "affine": {"clipping": "max", "activation_format": "int_affine"},
}


def train_in_all_ways(batch: int) -> dict[str, Any]:
    return {name: train(4, batch, steps=6, **case) for name, case in CASES.items()}


def they_train_as_one_does(processes: list[dict[str, Any]]) -> None:
    for case, alone in train_in_all_ways(8 * len(processes)).items():
        the_same_came_out([found["trained"][case] for found in processes], alone, case)


def the_same_came_out(processes: list[dict[str, Any]], alone: dict[str, Any], case: object) -> None:
    first, *others = processes
    for name, s in alone["first"].items():
        assert torch.allclose(first["first"][name], s, rtol=1e-6), (case, name)
    for name, value in alone["weights"].items():
        for other in others:  # all processes have the same weights
            assert torch.equal(first["weights"][name], other["weights"][name]), (case, name)
        if value.is_floating_point():
            assert torch.allclose(first["weights"][name], value, rtol=1e-6, atol=1e-8), (case, name)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_two_processes_train_as_one_does_for_longer(bits: int, tmp_path: Path) -> None:
    the_same_came_out(together(train, 2, tmp_path, bits), train(bits), bits)


def odds_and_ends() -> dict[str, Any]:
    shard = distributed.shard()
    assert ranks.is_main() == (shard.rank == 0)
    agreement = distributed.Agreement()
    assert [agreement.ask(step * shard.rank) for step in range(4)] == [0, 0, 1, 2]
    assert agreement.settle() == 3 and agreement.settle() == 0
    assert distributed.on_main(lambda: "said") == "said"
    said = _refused(lambda: distributed.on_main(_fail))
    parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    parts[0](torch.ones(1, 2)).sum().backward()
    trained = distributed.data_parallel(parts)
    assert isinstance(trained, distributed.DataParallel)
    trained.check()
    parts[1](torch.ones(1, 2)).sum().backward()
    late = _refused(trained.check)
    parts[0].zero_grad(), parts[1].zero_grad()
    parts[shard.rank](torch.ones(1, 2)).sum().backward()
    others = _refused(lambda: distributed.data_parallel(parts))
    totals = TASKS["classification"].totals(torch.device("cpu"))
    totals.add(torch.tensor(float(shard.rank)), torch.eye(5)[: 1 + shard.rank], torch.tensor([0, 4])[: 1 + shard.rank])
    return {
        "said": said,
        "late": late,
        "others": others,
        "gathered": distributed.all_gather(shard.rank),
        "totals": totals.merged().read(),
    }


def _fail() -> None:
    raise RunError("no")


def _refused(work: Callable[[], object]) -> str:
    with pytest.raises(RunError) as found:
        work()
    return str(found.value)


def in_two_processes() -> dict[str, Any]:
    """Run all checks for two processes at once, because starting them takes longer than the checks."""
    return {
        "scalars": scalars_of_parts(uneven()),
        "static": with_static_activations(),
        "statistics": with_statistics_anew(),
        "trained": train_in_all_ways(16),
        "odds": odds_and_ends(),
    }


def they_tell_each_other(two: list[dict[str, Any]]) -> None:
    for found in (each["odds"] for each in two):
        assert found["said"] == "no"
        assert found["late"].startswith("1.weight: had no gradient in the first step")
        assert found["others"].startswith("the processes have gradients of different parameters")
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


def in_three_processes() -> dict[str, Any]:
    return {"trained": train_in_all_ways(24), "signs": signs()}


def they_see_the_same_samples_before_they_begin(three: list[dict[str, Any]]) -> None:
    first, *others = (found["signs"] for found in three)
    assert first["conv1.input"]
    assert all(other == first for other in others)


def test_two_processes(tmp_path: Path) -> None:
    two = together(in_two_processes, 2, tmp_path)
    scalars_are_those_of_the_whole_batch(two)
    static_scalars_are_the_mean_over_processes(two)
    statistics_are_the_mean_over_processes(two)
    they_train_as_one_does(two)
    they_tell_each_other(two)


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    three = together(in_three_processes, 3, tmp_path)
    they_train_as_one_does(three)
    they_see_the_same_samples_before_they_begin(three)


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
        ValueError, match=f"clipping '{clipping}' cannot be synchronized over processes, only octav and max"
    ):
        Policy.of(4, clipping, synchronize=True)


def test_batchnorms_that_cannot_be_synchronized_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match="sync_batchnorm=true: 1 is a BatchNorm1d, which cannot be synchronized"):
        distributed.synchronize_batchnorm(model)


def test_synchronized_batchnorms_keep_their_activation_functions() -> None:
    """The conversion that is used on a GPU must compute the same."""
    model = timm.create_model("test_efficientnet.r160_in1k").eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    assert any(isinstance(module, BatchNormAct2d) for module in model.modules())
    with pytest.raises(ConfigError, match="is a BatchNormAct2d, which cannot be synchronized on this device"):
        distributed.synchronize_batchnorm(model)
    converted = distributed._synchronized_by_torch(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) > 5
    torch.testing.assert_close(converted(x), before)


@pytest.mark.parametrize("how", [{}, {"activation_format": "int_affine"}, {"range": "oriented"}])
def test_alone_frozen_scalars_are_the_running_ones(how: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = network(4, synchronize=False, **how).train()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    activations = [t.quantizer for t in quantized_tensors(model) if t.tensor != "weight"]
    running = [q.with_orientation(q.running_s).clone() for q in activations]
    freeze_activations(model)
    assert all(torch.equal(q.s, s) for q, s in zip(activations, running, strict=True))
    assert all(t.quantizer.dynamic == (t.tensor == "weight") for t in quantized_tensors(model))


def test_alone_nothing_changes() -> None:
    module = nn.Linear(2, 2)
    module.weight.grad = torch.ones(2, 2)
    assert distributed.data_parallel(module) is module
    distributed.broadcast(module)
    assert torch.equal(module.weight.grad, torch.ones(2, 2))
    assert distributed.shard() == Shard(0, 1) and distributed.all_gather(3) == [3]
    assert distributed.Agreement().ask(5) == 5
