"""Checkpoints that do not belong to a run are reported in one sentence, and the previous one is tried."""

import copy
import functools
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qat_runner.cli.export import main as export
from qat_runner.cli.run import main
from qat_runner.description import fit
from qat_runner.errors import RunError
from qat_runner.runs.checkpoints import Checkpoint
from qat_runner.training import checkpoint
from qat_runner.training.loop import Trainer
from tests.report.test_hostile_records import VALUES, places

RUN = (
    *("backend=eager", "model=resnet8", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=64"),
    *("batch_size=16", "epochs=2", "noise_batches=0", "checkpoint_minutes=1e-6"),
)


def qat_run(folder: Path, *more: str) -> int:
    return main([*RUN, f"run_dir={folder}", *more])


TRAINERS: list[Trainer] = []
"""The trainers of the runs that `stopped` made."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with two seeds, stopped within their second epoch."""
    runs = tmp_path_factory.mktemp("stopped")
    before = Trainer._add_gradients

    def stop(trainer: Trainer, batch: Any) -> Any:
        if (trainer.state.epoch, trainer.state.step) == (1, 1):
            TRAINERS.append(trainer)
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_add_gradients", stop)
        for seed in (0, 1):
            assert qat_run(runs / f"seed{seed}", f"seed={seed}") == 128 + signal.SIGTERM
    return runs


def with_(content: dict[str, Any], *keys: str, to: Any = ...) -> dict[str, Any]:
    """Return the content with the value at a nested key replaced by `to`, or deleted if `to` is not given."""
    *way, last = keys
    found = dict(content)
    place: Any = found
    for key in way:
        place[key] = dict(place[key])
        place = place[key]
    place.pop(last) if to is ... else place.__setitem__(last, to)
    return found


def beyond(content: dict[str, Any]) -> list[Any]:
    """Return NumPy's random state with its position beyond the end."""
    name, keys, _, *rest = content["processes"][0]["random"]["numpy"]
    return [name, keys, 1e6, *rest]


Spoil = Callable[[dict[str, Any]], Any]
FOREIGN: dict[str, tuple[Spoil, str]] = {
    "a list": (lambda c: [c], "it is not a dictionary"),
    "nothing": (lambda c: {}, "model: field required"),
    "no processes": (lambda c: with_(c, "processes"), "processes: field required"),
    "processes of none": (lambda c: with_(c, "processes", to=[]), "processes: list should have at least 1"),
    "no random state": (lambda c: with_(c, "processes", to=[{}]), "processes.0.random: field required"),
    "epoch 99 of 2": (lambda c: with_(c, "state", "epoch", to=99), "state.epoch: is 99, past the end of a run of 2"),
    "epoch -1": (lambda c: with_(c, "state", "epoch", to=-1), "state.epoch: input should be greater"),
    "step 99 of 4": (lambda c: with_(c, "state", "step", to=99), "state.step: is 99, but an epoch has 4"),
    "another key of state": (lambda c: with_(c, "state", "colour", to=1), "state.colour: unknown key"),
    "state of text": (lambda c: with_(c, "state", to="x"), "cannot be read"),
    "epoch of text": (lambda c: with_(c, "state", "epoch", to="1"), "state.epoch: input should be a valid integer"),
    "a model of text": (lambda c: with_(c, "model", to={"a": "b"}), "model.a: input should be an instance of Tensor"),
    "another key of the model": (lambda c: with_(c, "model", "colour", to=torch.ones(1)), "Unexpected key"),
    "another shape": (lambda c: with_(c, "model", "conv1.weight", to=torch.ones(1)), "size mismatch for conv1.weight"),
    "integers": (lambda c: with_(c, "model", "conv1.weight", to=c["model"]["conv1.weight"].int()), "is torch.int32"),
    "sparse": (lambda c: with_(c, "model", "conv1.weight", to=c["model"]["conv1.weight"].to_sparse()), "sparse_coo"),
    "no optimizer": (lambda c: with_(c, "optimizer", to={}), "does not fit this run"),
    "no groups": (lambda c: with_(c, "optimizer", "param_groups", to=[]), "optimizer.param_groups: has 0 groups, not"),
    "momentum of text": (
        lambda c: with_(c, "optimizer", "state", 0, to={"momentum_buffer": "x"}),
        "optimizer.state.0.momentum_buffer: must be a tensor of shape [16, 3, 3, 3], torch.float32",
    ),
    "momentum of another shape": (
        lambda c: with_(c, "optimizer", "state", 0, to={"momentum_buffer": torch.ones(1)}),
        "optimizer.state.0.momentum_buffer: must be a tensor of shape",
    ),
    "state of another optimizer": (
        lambda c: with_(c, "optimizer", "state", 0, to={"exp_avg": torch.ones(16, 3, 3, 3)}),
        "optimizer.state.0: must have momentum_buffer",
    ),
    "parameters of text": (
        lambda c: with_(
            c, "optimizer", "param_groups", to=[g | {"params": "x"} for g in c["optimizer"]["param_groups"]]
        ),
        "optimizer.param_groups.0.params: must be the indices",
    ),
    "a place beyond the random numbers": (
        lambda c: with_(c, "processes", to=[with_(c["processes"][0], "random", "numpy", to=beyond(c))]),
        "random.numpy: is not a state of a Mersenne Twister",
    ),
    "totals of another shape": (
        lambda c: with_(c, "processes", to=[with_(c["processes"][0], "totals", to=torch.ones(()))]),
        "totals: is of shape []",
    ),
    "another seed": (lambda c: with_(c, "config", "seed", to=7), "it belongs to a run with a different seed"),
    "another seed, of before": (lambda c: with_(c, "config", to={"seed": 7, "model": {"name": "resnet8"}}), "seed"),
}


def spoiled(stopped: Path, folder: Path, name: str) -> tuple[Path, str]:
    """A run whose checkpoints are both invalid, and the expected message."""
    spoil, message = FOREIGN[name]
    shutil.copytree(stopped / "seed0", folder)
    for file in (checkpoint.LAST, checkpoint.PREVIOUS):
        path = folder / "checkpoints" / file
        checkpoint.save(path, spoil(checkpoint.load(path)))
    return folder, message


def is_told(message: str, said: str) -> bool:
    return message in said and "last.pt" in said and "previous.pt" in said and "overwrite=true restarts" in said


@pytest.mark.parametrize("name", FOREIGN)
def test_what_does_not_fit_is_told(name: str, stopped: Path, tmp_path: Path) -> None:
    folder, message = spoiled(stopped, tmp_path / "run", name)
    with pytest.raises(RunError) as error:
        checkpoint.newest(folder / "checkpoints", TRAINERS[0].resume)
    assert is_told(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a list", "momentum of text"])
def test_a_run_tells_it(name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, message = spoiled(stopped, tmp_path / "run", name)
    assert qat_run(folder) == 1
    err = capsys.readouterr().err
    assert is_told(message, err) and err.count("\n") == 1 and "internal error" not in err


def test_the_checkpoint_of_another_run_gives_way_to_the_one_before(stopped: Path, tmp_path: Path) -> None:
    """The result is the same as without the foreign checkpoint."""
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    (folder / "checkpoints" / "last.pt").write_bytes((stopped / "seed1" / "checkpoints" / "last.pt").read_bytes())
    untouched = Path(shutil.copytree(stopped / "seed0", tmp_path / "untouched"))
    assert qat_run(folder) == qat_run(untouched) == 0
    log = (folder / "log.txt").read_text()
    assert "last.pt does not fit this run (it belongs to a run with a different seed); resuming" in log
    found, expected = (checkpoint.load(place / "checkpoints" / "last.pt")["model"] for place in (folder, untouched))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_checkpoints_of_before_go_on(stopped: Path, tmp_path: Path) -> None:
    """Old checkpoints held the config nested, with other keys."""
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    path = folder / "checkpoints" / "last.pt"
    config = {"seed": 0, "model": {"name": "resnet8"}, "weight_bits": 4, "clipping": {"eval_mode": "frozen"}}
    checkpoint.save(path, with_(checkpoint.load(path), "config", to=config))
    assert qat_run(folder) == 0
    assert "resuming after epoch 1 of 2, step" in (folder / "log.txt").read_text()


def test_force_takes_the_checkpoint_of_another_run(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    assert qat_run(folder, "lr=0.01") == 2
    assert qat_run(folder, "lr=0.01", "resume=force") == 0


def test_an_end_without_re_estimation_is_no_end_of_a_run_with_it(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of two epochs is shortened to one: the re-estimation after its last epoch has not been done."""
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    for file in (checkpoint.LAST, checkpoint.PREVIOUS):
        path = folder / "checkpoints" / file
        checkpoint.save(path, with_(checkpoint.load(path), "state", "step", to=0))
    (folder / "steps.csv").unlink()  # a killed run has no rows of its unfinished epoch
    assert qat_run(folder, "epochs=1", "resume=force", "recipe.batchnorm_batches=1") == 1
    assert "trained to its last epoch, 1, without recipe.batchnorm_batches" in capsys.readouterr().err


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


# Mutations by hypothesis

TENSORS = st.sampled_from(
    [
        *(torch.ones(1), torch.ones(()), torch.zeros(0), torch.full((16,), float("nan")), torch.ones(16, 3, 3, 3)),
        *(torch.ones(16, dtype=torch.int64), torch.ones(16, dtype=torch.complex64), torch.ones(2, device="meta")),
        *(torch.eye(3).to_sparse(), torch.ones(1).expand(10**9), torch.full((624,), 2**40)),
    ]
)


class Mutated:
    """A checkpoint with some values replaced, deleted or inserted."""

    def __init__(self, content: Any, edits: list[str]) -> None:
        self.content, self.edits = content, edits

    def __repr__(self) -> str:
        return "; ".join(self.edits)


@functools.cache
def _loaded(path: Path) -> dict[str, Any]:
    return checkpoint.load(path)


@st.composite
def mutated(draw: st.DrawFn, path: Path) -> Mutated:
    content: Any = copy.deepcopy(_loaded(path))
    edits: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        first = draw(st.sampled_from(sorted(content)))  # most hold few values compared with the model
        *way, last = draw(st.sampled_from([(first, *rest) for rest in places(content[first])]))
        place = content
        for key in way:
            place = place[key]
        how = draw(st.sampled_from(["replace", "delete", "insert"]))
        new = draw(VALUES | TENSORS)
        if how == "replace":
            place[last] = new
        elif how == "delete":
            del place[last]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=4))] = new
        edits.append(f"{how} {way} {last} {new!r}"[:300])
    return Mutated(content, edits)


def _take(trainer: Trainer, content: Any) -> None:
    """The checkpoint is rejected with a short message, or training continues from it."""
    refused = ""
    try:
        trainer.resume(content)
    except RunError as error:
        refused = str(error)
    assert "\n" not in refused and len(refused) < 300
    if refused:
        return
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    np.random.rand(1000)
    torch.rand(1000)
    [random.random() for _ in range(1000)]


def _mutations(stopped: Path, examples: int) -> None:
    trainer = TRAINERS[0]

    @settings(max_examples=examples, deadline=None, suppress_health_check=[*HealthCheck])
    @given(mutated(stopped / "seed0" / "checkpoints" / "last.pt"))
    def tried(found: Mutated) -> None:
        _take(trainer, found.content)

    with torch.random.fork_rng():
        tried()


def test_mutated_checkpoints(stopped: Path) -> None:
    _mutations(stopped, 60)


@pytest.mark.reliability
def test_many_mutated_checkpoints(stopped: Path) -> None:
    _mutations(stopped, 1000)


@pytest.mark.reliability
def test_mutated_checkpoints_are_exported_or_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutates the contents and the bytes of a checkpoint."""
    folder = Path(shutil.copytree(stopped / "seed0", tmp_path / "run"))
    path = folder / "checkpoints" / "last.pt"
    codes: list[int] = []

    sound = stopped / "seed0" / "checkpoints" / "last.pt"

    @settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck])
    @given(mutated(sound), st.none() | st.tuples(st.integers(0, path.stat().st_size - 1), st.binary(max_size=8)))
    def tried(found: Mutated, damage: tuple[int, bytes] | None) -> None:
        path.unlink(missing_ok=True)
        try:
            checkpoint.save(path, found.content)
        except (OSError, NotImplementedError):  # PyTorch cannot save it either
            assume(False)
        if damage is not None:
            with open(path, "r+b") as file:
                file.seek(damage[0])
                file.write(damage[1])
        capsys.readouterr()
        codes.append(export([str(folder), "--formats", "safetensors"]))
        err = capsys.readouterr().err
        assert "Traceback" not in err and "internal error" not in err
        assert codes[-1] == 0 or (codes[-1] in (1, 2) and err.count("qat-export: ") == 1), err

    tried()
    print({code: codes.count(code) for code in codes})
