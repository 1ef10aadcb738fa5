import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qat_runner.cli.run import main
from qat_runner.data.batches import Batch
from qat_runner.models import Source, build_model, match_weights
from qat_runner.quant import Octav, Quantizer
from qat_runner.training import checkpoint
from qat_runner.training.averages import Averages
from qat_runner.training.loop import Trainer

RUN = (
    *("backend=eager", "model=resnet8", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=16", "epochs=1", "noise_batches=0", "recipe.scratch.ema_decay=0.9", "recipe.scratch.mixup=0.8"),
    *("recipe.scratch.cutmix=1", "recipe.scratch.random_erasing=0.25", "recipe.scratch.label_smoothing=0.1"),
)


def test_an_average_is_what_pytorch_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours = Averages(model, 0.1)  # smaller than the decay of the first steps
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        ours.update(model)
        theirs.update_parameters(model)
    for (name, a), b in zip(ours.model.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        assert name.endswith("num_batches_tracked") or torch.allclose(a, b, atol=1e-6), name


def test_a_short_run_does_not_end_where_it_began() -> None:
    model = nn.Linear(1, 1, bias=False)
    averages = Averages(model, 0.9999)
    for value in range(11):
        nn.init.constant_(model.weight, value)
        averages.update(model)
    assert 6 < float(averages.model.get_parameter("weight")) < 10


def test_scalars_that_come_late_go_on_to_the_same_averages() -> None:
    """A quantizer that the first steps did not reach has an average over fewer steps, which is not finished yet."""
    model = nn.Sequential(Quantizer(4, Octav()), Quantizer(4, Octav()))
    whole, broken = Averages(model, 0.9), Averages(model, 0.9)
    for step in range(8):
        if step == 5:
            saved = copy.deepcopy(broken.model.state_dict())
            broken = Averages(model, 0.9)
            broken.model.load_state_dict(saved)
            broken.resume(saved, 5)
        for quantizer in model if step >= 3 else model[:1]:
            quantizer(torch.randn(50))
        whole.update(model)
        broken.update(model)
    for averages in (whole, broken):
        averages.model[1](torch.randn(50))
    for (name, a), b in zip(whole.model.state_dict().items(), broken.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.model[1].seen == 1


def test_a_run_goes_on_to_the_same_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*RUN, f"run_dir={whole}"]) == 0
    before = Trainer._add_gradients

    def stop(trainer: Trainer, batch: Batch) -> torch.Tensor:
        if len(trainer.interval.rates) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_add_gradients", stop)
        assert main([*RUN, f"run_dir={broken}"]) == 128 + signal.SIGTERM
    assert main([*RUN, f"run_dir={broken}"]) == 0
    one, other = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (whole, broken))
    for key in ("model", "trained"):
        assert all(torch.equal(t, other[key][name]) for name, t in one[key].items())
    assert one["averaged_steps"] == other["averaged_steps"] == 4
    assert not torch.equal(one["model"]["conv1.weight"], one["trained"]["conv1.weight"])
    assert (whole / "metrics.csv").read_text().splitlines()[-1].split(",")[:4] == (
        (broken / "metrics.csv").read_text().splitlines()[-1].split(",")[:4]
    )
    path = str(whole / "checkpoints" / "last.pt")
    state, loaded = match_weights(build_model("resnet8", 10, 8), Source(path), "resnet8", new_head=False)
    assert torch.equal(state["conv1.weight"], one["model"]["conv1.weight"]) and "(not trained)" in str(loaded)
