"""What is left to chance, by seeds: the order of an epoch, and what is drawn for a batch or a picture."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed for each (seed, epoch), far apart."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def shuffled(n: int, seed: int) -> Tensor:
    """The numbers from 0 to n - 1 in an order by a seed, int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """While open, torch's generator draws by a seed; afterwards it is as it was."""
    chance = torch.default_generator  # itself: torch.manual_seed asks after every kind of device, for each picture
    before = chance.get_state()
    try:
        chance.manual_seed(seed)
        yield
    finally:
        chance.set_state(before)
