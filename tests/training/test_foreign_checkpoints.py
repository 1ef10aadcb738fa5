"""Checkpoints that are not of the run that finds them: told in a sentence, and the one before them is tried."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_runner.cli.run import main
from qat_runner.training import checkpoint
from qat_runner.training.files import fit
from qat_runner.training.loop import Trainer
from qat_runner.training.records import Checkpoint

RUN = (
    *("backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=16", "epochs=2", "noise_batches=0", "checkpoint_minutes=1e-6"),
)


def qat_run(folder: Path, *more: str) -> int:
    return main([*RUN, f"run_dir={folder}", *more])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two seeds, stopped within their second epoch."""
    runs = tmp_path_factory.mktemp("stopped")
    before = Trainer._add_gradients

    def stop(trainer: Trainer, batch: Any) -> Any:
        if (trainer.state.epoch, trainer.state.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qat-run"])
        patch.setattr(Trainer, "_add_gradients", stop)
        for seed in (0, 1):
            assert qat_run(runs / f"seed{seed}", f"seed={seed}") == 128 + signal.SIGTERM
    return runs


def with_(content: dict[str, Any], *keys: str, to: Any = ...) -> dict[str, Any]:
    """The content with another value at a place; without `to`, without it."""
    *way, last = keys
    found = dict(content)
    place: Any = found
    for key in way:
        place[key] = dict(place[key])
        place = place[key]
    place.pop(last) if to is ... else place.__setitem__(last, to)
    return found


Spoil = Callable[[dict[str, Any]], Any]
FOREIGN: dict[str, tuple[Spoil, str]] = {
    "a list": (lambda c: [c], "it is no dictionary"),
    "nothing": (lambda c: {}, "model: field required"),
    "no processes": (lambda c: with_(c, "processes"), "processes: field required"),
    "processes of none": (lambda c: with_(c, "processes", to=[]), "processes: list should have at least 1"),
    "two processes": (lambda c: with_(c, "processes", to=c["processes"] * 2), "the state of 2 processes, not of 1"),
    "no random state": (lambda c: with_(c, "processes", to=[{}]), "processes.0.random: field required"),
    "epoch 99 of 2": (lambda c: with_(c, "state", "epoch", to=99), "state.epoch: is 99, of 2"),
    "epoch -1": (lambda c: with_(c, "state", "epoch", to=-1), "state.epoch: input should be greater"),
    "step 99 of 4": (lambda c: with_(c, "state", "step", to=99), "state.step: is 99, of 4"),
    "another key of state": (lambda c: with_(c, "state", "colour", to=1), "state.colour: extra inputs"),
    "state of text": (lambda c: with_(c, "state", to="x"), "cannot be read"),
    "epoch of text": (lambda c: with_(c, "state", "epoch", to="1"), "state.epoch: input should be a valid integer"),
    "a model of text": (lambda c: with_(c, "model", to={"a": "b"}), "model.a: input should be an instance of Tensor"),
    "another key of the model": (lambda c: with_(c, "model", "colour", to=torch.ones(1)), "Unexpected key"),
    "another shape": (lambda c: with_(c, "model", "conv1.weight", to=torch.ones(1)), "size mismatch for conv1.weight"),
    "no optimizer": (lambda c: with_(c, "optimizer", to={}), "does not fit this run"),
    "another seed": (lambda c: with_(c, "config", "seed", to=7), "it is of a run with another seed"),
    "another seed, of before": (lambda c: with_(c, "config", to={"seed": 7, "model": {"name": "resnet20"}}), "seed"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_does_not_fit_is_told(
    name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, told = FOREIGN[name]
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    for file in (checkpoint.LAST, checkpoint.PREVIOUS):
        path = folder / "checkpoints" / file
        content = checkpoint.load(path)
        checkpoint.save(path, spoil(content))
    assert qat_run(folder) == 1
    err = capsys.readouterr().err
    assert told in err and "last.pt" in err and "previous.pt" in err and "overwrite=true starts the run anew" in err
    assert err.count("\n") == 1 and "internal error" not in err


def test_the_checkpoint_of_another_run_gives_way_to_the_one_before(stopped: Path, tmp_path: Path) -> None:
    """All comes out as if nobody had meddled."""
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    (folder / "checkpoints" / "last.pt").write_bytes((stopped / "seed1" / "checkpoints" / "last.pt").read_bytes())
    untouched = Path(shutil.copytree(stopped / "seed0", tmp_path / "untouched"))
    assert qat_run(folder) == qat_run(untouched) == 0
    log = (folder / "log.txt").read_text()
    assert "last.pt does not fit this run (it is of a run with another seed); going on from the one before" in log
    found, expected = (checkpoint.load(place / "checkpoints" / "last.pt")["model"] for place in (folder, untouched))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_checkpoints_of_before_go_on(stopped: Path, tmp_path: Path) -> None:
    """They held their config nested, with other keys."""
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    path = folder / "checkpoints" / "last.pt"
    config = {"seed": 0, "model": {"name": "resnet20"}, "weight_bits": 4, "clipping": {"eval_mode": "frozen"}}
    checkpoint.save(path, with_(checkpoint.load(path), "config", to=config))
    assert qat_run(folder) == 0
    assert "going on after epoch 1 of 2, step" in (folder / "log.txt").read_text()


def test_force_takes_the_checkpoint_of_another_run(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    assert qat_run(folder, "lr=0.01") == 2
    assert qat_run(folder, "lr=0.01", "resume=force") == 0


def test_what_is_saved_fits_its_description(stopped: Path) -> None:
    fit(Checkpoint, checkpoint.load(stopped / "seed0" / "checkpoints" / "last.pt"))


def test_overwriting_empties_a_link_to_a_scratch_disk(stopped: Path, tmp_path: Path) -> None:
    folder, scratch = Path(shutil.copytree(stopped / "seed0", tmp_path / "run")), tmp_path / "scratch"
    for name in ("checkpoints", "tensorboard"):
        shutil.move(folder / name, scratch / name)
        (folder / name).symlink_to(scratch / name)
    (scratch / "checkpoints" / "old.pt").touch()
    assert qat_run(folder, "overwrite=true") == 0
    assert (folder / "checkpoints").is_symlink() and (folder / "tensorboard").is_symlink()
    assert {path.name for path in (scratch / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}


def test_a_lock_that_is_a_link_is_refused(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, thesis = Path(shutil.copytree(stopped / "seed0", tmp_path / "run")), tmp_path / "thesis"
    thesis.write_text("years of work")
    (folder / "lock").symlink_to(thesis)
    assert qat_run(folder) == 2
    assert "lock is a symbolic link, which is not followed" in capsys.readouterr().err
    assert thesis.read_text() == "years of work"
