"""Distributed training: with NCCL on GPUs, including a group of one process; with Gloo on a CPU."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qat_runner import distributed, ranks
from qat_runner.config import from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.data import Batch
from qat_runner.experiment import build
from qat_runner.quant import octav
from qat_runner.quant.pool import Processes
from qat_runner.runs.record import NullRecord
from qat_runner.training.loop import Trainer
from tests.training.processes import together

pytestmark = pytest.mark.slow


def own(kind: str) -> torch.device:
    return torch.device(kind, ranks.local_rank()) if kind == "cuda" else torch.device(kind)


def numbers(kind: str) -> dict[str, Any]:
    """Communicate between processes: tensors on the device, and plain numbers."""
    device = own(kind)
    x = torch.arange(1.0, 13.0).reshape(4, 3).to(device)
    agreement = distributed.Agreement()
    agreement.ask(ranks.local_rank())
    return {
        "by": dist.get_backend_config(),
        "sum": distributed.all_reduce(x.clone()).cpu(),
        "rank": distributed.all_gather(ranks.local_rank()),
        "agreed": agreement.settle(),
        "octav": octav(distributed.shard().samples(x), 4, pool=Processes()).cpu(),
    }


def trained(kind: str, folder: Path, compiled: bool) -> dict[str, Tensor]:
    """Return the losses of some steps of the trainer in float64, and the weights after them."""
    small = ("model=resnet20", "model.width=0.25", "dataset=digits", "batch_size=32", "bits=8")
    config = from_hydra(compose_config([*small, f"device={own(kind)}", f"compile={str(compiled).lower()}"]))
    model, data = build(config, None)
    trainer = Trainer(config, model.train().double(), data, NullRecord(folder))
    batches = [Batch((b.inputs[0].double(),), b.targets) for b in data.train_batches(32, 0, 4, 0)]
    losses = trainer._mean_over_processes(torch.stack([trainer._step(batch) for batch in batches]))
    return {"losses": losses.cpu(), **{name: p.detach().cpu() for name, p in model.named_parameters()}}


def work(kind: str, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {
        "numbers": numbers(kind),
        "eager": trained(kind, folder, compiled=False),
        "compiled": trained(kind, folder, compiled=True),
    }


@pytest.mark.parametrize("world", [1, 2])
def test_they_work_together(world: int, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < world:
        pytest.skip("one CUDA device only")
    found = together(work, world, tmp_path, device.type, tmp_path)
    for each in found:
        assert ("nccl" if device.type == "cuda" else "gloo") in each["numbers"]["by"]
        assert each["numbers"]["agreed"] == world - 1 and each["numbers"]["rank"] == list(range(world))
        torch.testing.assert_close(each["numbers"]["sum"], torch.arange(1.0, 13.0).reshape(4, 3) * world)
        torch.testing.assert_close(each["numbers"]["octav"], octav(torch.arange(1.0, 13.0), 4))
        torch.testing.assert_close(each["compiled"], each["eager"], rtol=1e-6, atol=1e-9)
        for name, weight in each["compiled"].items():
            assert torch.equal(weight, found[0]["compiled"][name]), name
