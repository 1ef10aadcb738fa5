"""Modes that a network is looked at in, and comes out of as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, all modules are in eval mode; afterwards each is in the mode that it was in."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def taking_the_ways_of_training(model: nn.Module) -> Iterator[None]:
    """While open, the network computes what it computes in training (auxiliary heads, say), and remembers none of it.

    Modules that are made of others are in train mode: it is they who decide what is computed. The innermost, such as
    BatchNorm, dropout and quantizers, are in eval mode. Random generators come out as they went in.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with _modes_kept(model), torch.random.fork_rng(devices):
        for module in model.modules():
            module.training = next(module.children(), None) is not None
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
