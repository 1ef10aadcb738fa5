"""Seeded randomness: the order of an epoch, and the random numbers of a batch or an image."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for (seed, epoch); the seeds of different pairs are unrelated."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def shuffled(n: int, seed: int) -> Tensor:
    """Return the numbers from 0 to n - 1, shuffled with a seed, int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator within the context; restore its state afterwards."""
    chance = torch.default_generator  # used directly: torch.manual_seed would check every kind of device for each image
    before = chance.get_state()
    try:
        chance.manual_seed(seed)
        yield
    finally:
        chance.set_state(before)
