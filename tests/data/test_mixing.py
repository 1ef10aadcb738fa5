import pytest
import torch
from torch.nn import functional as F

from qat_runner.config import StageConfig
from qat_runner.data.batches import WHOLE, Batch, Shard
from qat_runner.data.mixing import Mixing
from qat_runner.tasks.totals import top_five

CLASSES = 12


def stage(**keys: float) -> StageConfig:
    return StageConfig(epochs=1, batch_size=1, lr=1, **keys)  # type: ignore[arg-type]


def batch(n: int = CLASSES) -> Batch:
    """Make images in which every pixel is the index of the class."""
    classes = torch.arange(n) % CLASSES
    return Batch((classes.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone(),), classes)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_targets_are_the_shares_of_the_images(key: str) -> None:
    mixing = Mixing(stage(**{key: 1.0}), CLASSES, 0, WHOLE)
    mixed = [mixing(batch(), 0, step) for step in range(20)]
    for (images,), targets in mixed:
        assert torch.allclose(targets.sum(1), torch.ones(CLASSES))
        assert torch.allclose(images.mean((1, 2, 3)), targets @ torch.arange(CLASSES).float(), atol=1e-5)
        assert len(images[1].unique()) == (1 if key == "mixup" else min(2, len(targets[1].unique()) - 1) or 1)
    assert len({float(targets.max()) for _, targets in mixed}) > 10


def test_chance_is_of_seed_epoch_and_step_alone() -> None:
    mixing = Mixing(stage(mixup=0.8, cutmix=1.0, random_erasing=0.5), CLASSES, 3, WHOLE)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = mixing(batch(), 2, 5)
    assert torch.equal(torch.get_rng_state(), before)
    others = [mixing(batch(), *place) for place in ((2, 6), (3, 5))]
    torch.manual_seed(9)
    again = mixing(batch(), 2, 5)
    assert torch.equal(first.targets, again.targets) and torch.equal(first.inputs[0], again.inputs[0])
    assert all(not torch.equal(first.inputs[0], other.inputs[0]) for other in others)


def test_what_is_erased_does_not_depend_on_the_number_of_processes() -> None:
    keys = stage(random_erasing=0.5)
    whole = Mixing(keys, CLASSES, 0, WHOLE)(Batch((torch.ones(64, 3, 8, 8),), torch.zeros(64, dtype=torch.int64)), 0, 0)
    assert 16 < int((whole.inputs[0].flatten(1) == 0).any(1).sum()) < 48
    for rank in (0, 1):
        shard = Shard(rank, 2)
        part = Batch((torch.ones(32, 3, 8, 8),), torch.zeros(32, dtype=torch.int64))
        assert torch.equal(Mixing(keys, CLASSES, 0, shard)(part, 0, 0).inputs[0], shard.samples(whole.inputs[0]))


def test_the_largest_share_is_what_is_right() -> None:
    logits = torch.eye(CLASSES)
    soft = 0.6 * F.one_hot(torch.arange(CLASSES)) + 0.4 * F.one_hot(torch.arange(CLASSES).roll(1))
    assert top_five(logits, soft)[0] == CLASSES
    assert top_five(logits, 1 - soft)[0] == 0
