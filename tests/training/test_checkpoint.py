import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat_runner.config import from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.config.schema import Optimizer, StageConfig
from qat_runner.data import load_dataset
from qat_runner.data.dataset import Delivery
from qat_runner.errors import RunError
from qat_runner.insertion import quantize_model
from qat_runner.insertion.insert import QuantizationWarning
from qat_runner.runs.record import NullRecord
from qat_runner.training import checkpoint, recipe
from qat_runner.training.freezing import dynamic_activations
from qat_runner.training.loop import Trainer
from qat_runner.training.recipe import make_optimizer


def test_random_state_round_trip(tmp_path: Path) -> None:
    checkpoint.seed_everything(5)
    checkpoint.save(tmp_path / "c.pt", {"random": checkpoint.random_state()})
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    checkpoint.set_random_state(checkpoint.load(tmp_path / "c.pt")["random"])
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)) == drawn
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the newest checkpoint, of step 2, and the previous one, of step 1."""
    for step in (1, 2):
        content = {"step": step, "x": torch.randn(500), "nested": {"list": [1.5, "text", None]}}
        checkpoint.save(tmp_path / checkpoint.LAST, content, keep=tmp_path / checkpoint.PREVIOUS)
    return tmp_path


def test_the_newest_is_read_and_any_tool_can(two: Path) -> None:
    assert checkpoint.newest(two)["step"] == 2
    assert checkpoint.load(two / checkpoint.PREVIOUS)["step"] == 1
    assert torch.load(two / checkpoint.LAST, weights_only=True)["nested"] == {"list": [1.5, "text", None]}


def test_a_cut_checkpoint_is_never_read(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, chance = two / checkpoint.LAST, random.Random(0)
    whole = path.read_bytes()
    for length in [0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(97))]:
        path.write_bytes(whole[:length])
        caplog.clear()
        assert checkpoint.newest(two)["step"] == 1
        assert "last.pt cannot be read" in caplog.text and "resuming from the previous one" in caplog.text
        with pytest.raises(RunError, match=r"last\.pt cannot be read"):
            checkpoint.load(path)


def test_a_checkpoint_with_a_flipped_bit_is_never_read(two: Path) -> None:
    path, chance = two / checkpoint.LAST, random.Random(0)
    whole = path.read_bytes()
    for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(98))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert checkpoint.newest(two)["step"] == 1
    path.write_bytes(whole + b"x")
    assert checkpoint.newest(two)["step"] == 1


def test_nothing_whole_is_left(two: Path) -> None:
    (two / checkpoint.LAST).write_bytes(b"")
    (two / checkpoint.PREVIOUS).write_bytes(b"PK")
    with pytest.raises(RunError, match=r"last\.pt cannot be read .*; .*previous\.pt cannot be read .*overwrite=true"):
        checkpoint.newest(two)
    with pytest.raises(RunError, match="holds no checkpoint"):
        checkpoint.newest(two / "nowhere")
    assert not checkpoint.exists(two / "nowhere") and checkpoint.exists(two)


def test_a_write_that_fails_leaves_the_old_content(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("[enforce fail] unexpected pos 64 vs 0")  # what torch raises on a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.pt: \[enforce fail\]"):
        checkpoint.save(two / checkpoint.LAST, {}, keep=two / checkpoint.PREVIOUS)
    assert checkpoint.newest(two)["step"] == 2
    assert sorted(path.name for path in two.iterdir()) == ["last.pt", "previous.pt"]


def test_a_crash_between_the_two_renames_loses_nothing(two: Path) -> None:
    (two / checkpoint.LAST).rename(two / checkpoint.PREVIOUS)
    assert checkpoint.newest(two)["step"] == 2


@pytest.mark.parametrize("fused", [(None, True), (True, None)])
@pytest.mark.parametrize("name", [*Optimizer])
def test_a_run_goes_on_on_another_device(
    name: str, fused: tuple[bool | None, bool | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's kind of optimizer takes over the state, also from checkpoints older than the fused kind."""
    layer = torch.nn.Linear(3, 2)

    def stepped(kind: bool | None, saved: dict[str, Any] | None = None) -> torch.optim.Optimizer:
        monkeypatch.setattr(recipe, "fuses", lambda device: kind)
        optimizer = make_optimizer(layer, StageConfig(optimizer=name), 0.1)
        if saved is not None:
            optimizer.load_state_dict(checkpoint.checked_optimizer(saved, optimizer))
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
        return optimizer

    then, now = fused
    resumed = stepped(now, stepped(then).state_dict())
    assert all(group["fused"] is now for group in resumed.param_groups)
    if name == Optimizer.adamw:
        assert {float(state["step"]) for state in resumed.state.values()} == {2.0}


@pytest.mark.parametrize("name", [*Optimizer])
def test_the_state_of_every_optimizer_is_taken(name: str) -> None:
    def trained() -> torch.optim.Optimizer:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make_optimizer(model, StageConfig(optimizer=name), 0.1)
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return optimizer

    optimizer = trained()
    saved = optimizer.state_dict()
    assert saved["state"]
    taken = checkpoint.checked_optimizer(saved, trained())
    assert taken["param_groups"] == saved["param_groups"] and taken["state"] is saved["state"]


def test_an_optimizer_goes_on_as_it_is_asked_for() -> None:
    """Weight decay and momentum may change, which resume=force allows."""
    model = torch.nn.Linear(3, 2)

    def made(**stage: float) -> torch.optim.Optimizer:
        return make_optimizer(model, StageConfig(**stage), 0.1)  # type: ignore[arg-type]

    optimizer = made(weight_decay=1e-4, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    other = made(weight_decay=0.5, momentum=0.25)
    other.load_state_dict(checkpoint.checked_optimizer(optimizer.state_dict(), other))
    (group,) = other.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.25)
    for p in model.parameters():
        assert torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


class Branching(torch.nn.Module):
    """A network with two layers, only one of which an input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.taken = torch.nn.Linear(192, 10), torch.nn.Linear(192, 10), "one"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.taken)(x.flatten(1))  # type: ignore[no-any-return]


def test_scalars_are_frozen_once(tmp_path: Path) -> None:
    """A quantizer that training has not reached by then stays dynamic, with or without an interruption."""
    overrides = ["model=resnet8", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=16", "batch_size=4"]
    config = from_hydra(compose_config([*overrides, "device=cpu", "epochs=2", "recipe.freeze_scalars_at=1"]))
    data = load_dataset(config.dataset, "data", Delivery(torch.device("cpu"), seed=0))
    images = torch.randn(4, 3, 8, 8)

    def trainer() -> Trainer:
        model = quantize_model(Branching(), 4)
        with pytest.warns(QuantizationWarning, match="other is not called"):
            model(images)
        return Trainer(config, model.train(), data, NullRecord(tmp_path))  # type: ignore[arg-type]

    (tmp_path / "checkpoints").mkdir()
    whole = trainer()
    whole.model(images)
    whole._freeze_if_due(1.0)
    assert not whole.to_freeze and len(dynamic_activations(whole.model)) == 1
    whole._save()
    again, path = trainer(), tmp_path / "checkpoints" / "last.pt"
    assert again.to_freeze
    again.resume(checkpoint.load(path))
    assert not again.to_freeze and len(dynamic_activations(again.model)) == 1

    before = trainer()
    before.model(images)
    before._save()  # replaces a last.pt that is frozen and otherwise fits no run
    frozen = path.with_name("previous.pt").rename(path.with_name("frozen.pt"))
    path.rename(path.with_name("previous.pt"))
    content = checkpoint.load(frozen)
    checkpoint.save(path, content | {"optimizer": content["optimizer"] | {"param_groups": []}})
    again = trainer()
    checkpoint.newest(tmp_path / "checkpoints", again.resume)
    assert again.to_freeze and len(dynamic_activations(again.model)) == 2
