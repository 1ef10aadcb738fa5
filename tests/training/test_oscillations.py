import copy
import itertools
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from qat_runner.cli.run import main
from qat_runner.data import Batch
from qat_runner.insertion import quantize_model, quantized_tensors
from qat_runner.runs.records import METRICS, OSCILLATIONS, SUMMARY
from qat_runner.training import checkpoint
from qat_runner.training.batch_norm import reestimate
from qat_runner.training.dampening import Dampening
from qat_runner.training.latent import LatentWeight, latent_weights
from qat_runner.training.loop import Trainer
from qat_runner.training.oscillations import Oscillations, half_cosine

KINDS: list[dict[str, Any]] = [
    {},
    {"range": "oriented", "linear_granularity": "channel"},
    {"range": "full", "clipping": "max"},
    {"format": "int_affine", "linear_granularity": "channel"},
]


def image_batches(count: int) -> list[Batch]:
    return [Batch((torch.randn(2, 3, 8, 8),), torch.zeros(2, dtype=torch.int64)) for _ in range(count)]


def network(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return quantize_model(layers, 4, first_last_bits=None, example=torch.randn(4, 6), **how).train()


def step(model: nn.Module) -> None:
    """A forward and backward pass."""
    model.zero_grad()
    model(torch.randn(4, 6)).square().sum().backward()


def levels_below(weight: LatentWeight) -> list[int]:
    """Compute places in another way: count the levels between zero and the level each element is rounded to."""
    s, format = weight.quantizer.scalars, weight.quantizer.format
    rows = torch.arange(len(weight.x)) if weight.quantizer.dim is not None else torch.zeros(len(weight.x), dtype=int)
    found = []
    for row, xs in zip(rows.tolist(), weight.x.detach().tolist(), strict=True):
        own = s.reshape(format.parts, -1)[:, row]
        if format.parts == 1:
            levels = [float(own) * level for level in format.levels]
        else:
            low, high = own.tolist()
            zero = round(-low / ((high - low) / 15))
            levels = [(code - zero) * (high - low) / 15 for code in range(16)]
        for x in xs:
            to = min(levels, key=lambda level: abs(level - x))
            found.append(round(math.copysign(sum(0 < abs(v) <= abs(to) and v * to > 0 for v in levels), to)))
    return found


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "oriented", "full", "affine"])
def test_flips_are_counted_as_defined(kind: dict[str, Any]) -> None:
    model = network(**kind)
    watched = Oscillations(latent_weights(model), momentum=0.2, threshold=0.3)
    history: list[list[int]] = []
    for i in range(12):
        step(model)
        history.append([place for weight in watched.weights for place in levels_below(weight)])
        watched.observe(0.0)
        for weight in watched.weights:
            weight.x.data += 0.1 * (-1) ** i * torch.rand_like(weight.x)
    for k, frequency in enumerate(watched.state["frequency"].tolist()):
        f, last = 0.0, 0
        for before, after in itertools.pairwise(history):
            change = (after[k] > before[k]) - (after[k] < before[k])
            f = 0.2 * (change * last == -1) + 0.8 * f
            last = change or last
        assert frequency == pytest.approx(f, abs=1e-6)
    share = [sum(f > 0.3 for f in part.tolist()) / len(part) for part in watched.state["frequency"].split([48, 24])]
    assert [row["oscillating"] for row in watched.rows()] == pytest.approx([100 * part for part in share])
    together = (48 * share[0] + 24 * share[1]) / 72
    assert watched.totals() == {"oscillating_weights": pytest.approx(100 * together), "frozen_weights": 0.0}
    assert 0 < share[0] < 1


@pytest.mark.parametrize("kind", [*KINDS, {"clipping": "lsq"}], ids=["plain", "oriented", "full", "affine", "lsq"])
def test_what_is_frozen_keeps_its_place(kind: dict[str, Any]) -> None:
    model = network(**kind)
    for t in quantized_tensors(model):
        if not t.quantizer.ready:
            t.quantizer.assign(torch.ones_like(t.quantizer.s))
    watched = Oscillations(latent_weights(model), momentum=0.2, threshold=0.3, freezes=(0.5, 0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    places: list[Tensor] = []
    for i in range(12):
        step(model)
        watched.observe(i / 12)
        places.append(watched.state["place"])
        optimizer.step()
        for weight in watched.weights:
            weight.x.data += 0.02 * (-1) ** i * torch.rand_like(weight.x)
        watched.restore_frozen()
    frozen, mean = watched.state["frozen"], watched.state["mean"]
    assert 0 < int(frozen.sum()) < len(frozen)
    for k in frozen.nonzero().flatten().tolist():
        e, f, last, threshold = float(places[0][k]), 0.0, 0.0, 0.5
        for i in range(1, 12):
            change = float((places[i][k] - places[i - 1][k]).sign())
            f, e = 0.2 * (change * last == -1) + 0.8 * f, 0.2 * float(places[i][k]) + 0.8 * e
            last, threshold = change or last, 0.1 + 0.4 * (1 + math.cos(math.pi * i / 12)) / 2
            if f > threshold:
                break
        assert f > threshold and float(mean[k]) == round(e)
    step(model)
    assert torch.equal(torch.cat([w.places().flatten() for w in watched.weights])[frozen], mean[frozen])
    watched.observe(0.99)
    grads = torch.cat([weight.x.grad.flatten() for weight in watched.weights])  # type: ignore[union-attr]
    assert not grads[watched.state["frozen"]].any() and grads.any()


def test_another_state_is_refused() -> None:
    watched = Oscillations(latent_weights(network()), 0.1, 0.1, (0.1, 0.1))
    for saved in ({}, watched.state | {"frozen": watched.state["mean"]}, watched.state | {"place": torch.zeros(3)}):
        with pytest.raises(ValueError, match="oscillations"):
            watched.load(saved)


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "oriented", "full", "affine"])
def test_the_gradient_of_dampening_is_that_of_its_term(kind: dict[str, Any]) -> None:
    model = network(**kind)
    step(model)
    weights = latent_weights(model)
    before = [weight.x.grad.clone() for weight in weights]  # type: ignore[union-attr]
    Dampening(weights, 0.3).add_gradients(0.75)
    strength = half_cosine(0.0, 0.3, 0.75)
    assert strength == pytest.approx(0.3 * (1 - math.cos(0.75 * math.pi)) / 2)
    for weight, grad in zip(weights, before, strict=True):
        x = weight.x.detach().requires_grad_()
        format, s = weight.quantizer.format, weight.quantizer.scalars
        levels = format.decode(torch.arange(format.lowest, format.highest + 1).float().reshape(-1, 1, 1), s)  # type: ignore[attr-defined]
        term = (weight.quantized() - x.clamp(levels.amin(0), levels.amax(0))).square().sum()
        (of_term,) = torch.autograd.grad(strength * term, x)
        assert weight.x.grad is not None and of_term.any()
        assert torch.allclose(weight.x.grad, grad + of_term, atol=1e-6)


def test_statistics_are_those_that_pytorch_has() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    batches = image_batches(3)
    for _ in range(5):
        model(torch.randn(2, 3, 8, 8))
    theirs = copy.deepcopy(model)
    update_bn([batch.inputs[0] for batch in batches], theirs)
    reestimate(model, batches, lambda m, inputs: m(*inputs))
    for ours, other in zip(model.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(ours, other)
    assert not any(module.training for module in model.modules()) and model[1].momentum == 0.1


def test_quantizers_remember_nothing_of_it() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3))
    model = quantize_model(layers, 4, example=torch.randn(2, 3, 8, 8)).train()
    model(torch.randn(2, 3, 8, 8))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    reestimate(model, image_batches(2), lambda m, inputs: m(*inputs))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


RUN = (
    *("backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=16", "epochs=2", "noise_batches=0", "lr=0.3", "recipe.batchnorm_batches=2"),
    "recipe.scratch.schedule=cosine",
    *("oscillations.momentum=0.3", "oscillations.freeze_to=0.1", "oscillations.dampening=0.01"),
)


@pytest.mark.parametrize("where", ["training", "first validation", "second validation"])
@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_never_stopped(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*RUN, f"run_dir={whole}"]) == 0
    passes = {"training": 0, "first validation": 2, "second validation": 3}[where]
    step, evaluate = Trainer._step, Trainer._evaluate
    begun: list[None] = []

    def stopping_step(trainer: Trainer, batch: Any) -> Tensor:
        if not passes and trainer.state.epoch == 1 and len(trainer.interval.rates) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    def stopping_evaluate(trainer: Trainer, progress: Any) -> dict[str, float]:
        begun.append(None)
        if len(begun) == passes:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping_step)
        patch.setattr(Trainer, "_evaluate", stopping_evaluate)
        assert main([*RUN, f"run_dir={broken}"]) == 128 + signal.SIGTERM
    assert main([*RUN, f"run_dir={broken}"]) == 0
    one, other = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (whole, broken))
    for key in ("model", "oscillations"):
        assert all(torch.equal(t, other[key][name]) for name, t in one[key].items())
    assert one["oscillations"]["frozen"].any() and not one["oscillations"]["frozen"].all()
    for file in (SUMMARY, METRICS, OSCILLATIONS):
        found = [file.read(folder) for folder in (whole, broken)]
        for records in found:
            for record in [records] if isinstance(records, dict) else records:
                for key in ("seconds", "samples_per_second", "run_dir"):
                    record.pop(key, None)
        assert found[0] == found[1]
    summary = SUMMARY.read(whole)
    assert summary is not None and summary["batchnorm_batches"] == 2 and summary["before_reestimation"] is not None
    assert 0 < summary["frozen_weights"] < 100


def test_what_is_off_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracking codes does not change any result of a run, nor does freezing that freezes nothing."""
    base = [argument for argument in RUN if not argument.startswith(("osc", "recipe", "epochs"))]
    found = []
    watching = ["oscillations.freeze_to=0.99", "oscillations.freeze_from=0.99"]
    for name, more in {"plain": [], "watched": watching}.items():
        assert main([*base, "epochs=1", *more, f"run_dir={tmp_path / name}"]) == 0
        found.append(checkpoint.load(tmp_path / name / "checkpoints" / "last.pt"))
    assert all(torch.equal(t, found[1]["model"][name]) for name, t in found[0]["model"].items())
    assert "oscillations" not in found[0] and not (tmp_path / "plain" / "oscillations.csv").exists()
    assert len(OSCILLATIONS.read(tmp_path / "watched")) == 18


def test_freezing_begins_in_a_run_that_was_only_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = [argument for argument in RUN if not argument.startswith(("osc", "model", "epochs"))]
    base += ["model=resnet8", f"run_dir={tmp_path}"]
    assert main([*base, "epochs=1", "oscillations.measure=true"]) == 0
    assert main([*base, "epochs=2", "oscillations.freeze_to=0.1", "resume=force"]) == 0
    assert "tracking starts over" in (tmp_path / "log.txt").read_text()
    assert "frozen" in checkpoint.load(tmp_path / "checkpoints" / "last.pt")["oscillations"]
