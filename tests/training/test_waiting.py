"""No training step waits for the device; checked without a GPU, through the operations that are called.

Not detected are copies that wait, such as those of pageable memory, and kernels written for the GPU.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_runner.config import from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.data import Batch, load_dataset
from qat_runner.data.dataset import Delivery
from qat_runner.insertion import calibrate, quantize_model
from qat_runner.models import build_bert
from qat_runner.quant import kernels
from qat_runner.quant.kernels import newton
from qat_runner.runs.record import NullRecord
from qat_runner.tasks import TASKS
from qat_runner.training import recipe
from qat_runner.training.loop import Interval, Trainer
from tests.tiny import tiny_bert
from tests.training.watch import Watch

CPU, META = torch.device("cpu"), torch.device("meta")
IMAGES = ("model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=16", "batch_size=4")
ADAMW = ("recipe.scratch.optimizer=adamw", "recipe.scratch.bias_correction=false", "recipe.scratch.max_grad_norm=1")


def trainer(folder: Path, device: torch.device, *overrides: str, **quantization: Any) -> Trainer:
    """Return a trainer of a network with four quantized tensors whose scalars a step on the CPU has initialized."""
    config = from_hydra(compose_config([*IMAGES, "device=cpu", *overrides]))
    layers = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    )
    model = quantize_model(layers, **{"bits": 4, "example": torch.randn(2, 3, 8, 8)} | quantization)
    images = torch.randn(4, 3, 8, 8)
    if quantization.get("clipping") == "lsq":
        calibrate(model, [(images,)])
    model.train()(images)
    data = load_dataset(config.dataset, "data", Delivery(CPU, seed=0))
    return Trainer(config, model.to(device), replace(data, device=device), NullRecord(folder))  # type: ignore[type-var]


def batch(device: torch.device) -> Batch:
    return Batch((torch.randn(4, 3, 8, 8, device=device),), torch.zeros(4, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("overrides", "quantization"),
    [
        ((), {}),
        (ADAMW, {}),
        (("accumulate=2",), {"clipping": "max", "gradient": "pwl"}),
        (("recipe.distill=full_precision", "recipe.teacher=teacher.pt"), {"format": "int_affine"}),
        ((), {"range": "oriented"}),
        (ADAMW, {"clipping": "lsq"}),
        (("oscillations.freeze_to=0.01", "oscillations.dampening=0.1"), {"first_last_bits": None}),
    ],
    ids=["octav", "adamw", "max, parts", "affine, teacher", "oriented", "lsq", "frozen, dampened"],
)
def test_a_step_needs_no_number(tmp_path: Path, overrides: tuple[str, ...], quantization: dict[str, Any]) -> None:
    """The meta device holds no values, so reading one raises, as does an output whose size depends on values."""
    training = trainer(tmp_path, META, *overrides, **quantization)
    if training.config.distilling:
        training.teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).to(META)
    assert training._step(batch(META)).is_meta
    assert training.totals.sums.is_meta


def test_a_forward_pass_of_a_bert_needs_none_either(tmp_path: Path) -> None:
    """It does not even check whether any token is padding."""
    model = build_bert(str(tiny_bert(tmp_path / "bert", layers=1)), pretrained=True)
    inputs = (torch.full((2, 16), 7), torch.ones(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64))
    quantize_model(model, bits=4, clipping="max", example=inputs).train()
    task = TASKS["question_answering"]
    task.compute(model, inputs)
    on_meta = [t.to(META) for t in inputs]
    logits = task.compute(model.to(META), on_meta)
    loss = task.loss(logits, torch.zeros(2, 2, dtype=torch.int64, device=META))
    loss.backward()
    assert loss.is_meta


@pytest.fixture
def never_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the solver from reading its state, as on a GPU; on a CPU it may, because nothing waits there."""
    solve: Callable[..., Tensor] = newton.solve
    monkeypatch.setattr(newton, "solve", lambda *args, **options: solve(*args, **options | {"look": False}))


@pytest.mark.parametrize("norm", ["null", "1"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.usefixtures("never_free")
def test_a_step_of_any_precision_with_the_optimizer_of_a_gpu(
    amp: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fused in (None, True):
        monkeypatch.setattr(recipe, "fuses", lambda device, fused=fused: fused)
        training = trainer(tmp_path, CPU, f"amp={amp}", f"recipe.scratch.max_grad_norm={norm}")
        with kernels.using("eager"), Watch() as watch:
            training._step(batch(CPU))
        scaler_asks = amp == "fp16" and not fused  # whether gradients overflowed
        assert watch.waited == ["aten._local_scalar_dense.default"] * scaler_asks


@pytest.mark.parametrize("optimizer", [(), ADAMW], ids=["sgd", "adamw"])
def test_a_step_that_overflows_is_skipped_without_asking(
    optimizer: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for the first step as well, which leaves no trace."""
    monkeypatch.setattr(recipe, "fuses", lambda device: True)
    training, given = trainer(tmp_path, CPU, "amp=fp16", *optimizer), batch(CPU)
    before = copy.deepcopy(training.model.state_dict())
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    training._step(given)
    assert training.scaler.get_scale() == 2.0**99
    assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())
    training.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    training.model.load_state_dict(before)  # restores scalars and statistics, which have seen the batch
    training._step(given)
    fresh = trainer(tmp_path, CPU, "amp=fp16", *optimizer)
    fresh.model.load_state_dict(before)
    fresh.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    fresh._step(given)
    for p, expected in zip(training.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)


def test_totals_launch_little() -> None:
    """Two operations for the loss, one for the samples, six for the two hit counts."""
    totals = TASKS["classification"].totals(CPU)
    loss, logits, targets = torch.tensor(1.0), torch.randn(8, 100), torch.arange(8)
    with Watch() as watch:
        totals.add(loss, logits, targets)
    assert len(watch.launched) <= 9
    assert not watch.waited


def test_of_a_batch_in_one_part_the_loss_is_that_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The returned loss is the same tensor: nothing is scaled by a share or added to zero."""
    training = trainer(tmp_path, CPU)
    losses: list[Tensor] = []
    compute = training._loss
    monkeypatch.setattr(training, "_loss", lambda *args: losses.append(compute(*args)) or losses[-1])
    mean = training._add_gradients(batch(CPU))
    assert mean.data_ptr() == losses[0].data_ptr() and not mean.requires_grad


def test_no_tensor_of_a_step_lasts_into_the_next() -> None:
    """Small tensors that last would fragment the memory of large ones, so that memory grew with each step."""
    interval = Interval(3)
    losses = [torch.tensor(float(i)) for i in range(3)]
    kept = [weakref.ref(loss) for loss in losses]
    while losses:
        excess = torch.stack([losses[0], losses[0] + 1])
        kept.append(weakref.ref(excess))
        interval.add(losses.pop(0), 0.1, excess)
        del excess
    assert [tensor() for tensor in kept] == [None] * 6
    assert interval.losses.tolist() == [0, 1, 2]
    assert interval.excess.tolist() == [[0, 1], [1, 2], [2, 3]]
