"""Running a network over batches in order to look at what its quantizers are given."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.insert import quantized_tensors
from qat_runner.quant import Quantizer

Batches = Iterable[Tensor | tuple[Any, ...]]
"""Each an input tensor, or a tuple of arguments of forward."""


@torch.no_grad()
def watch(model: nn.Module, batches: Batches, look: Callable[[Quantizer, Tensor], None] | None = None) -> int:
    """Run a model over batches, in eval mode.

    Args:
        model: with quantizers; afterwards its modules are in the modes that they were in.
        batches: see above.
        look: is shown each quantizer after each call, and the tensor that it was given; None: nobody looks.

    Returns:
        How many batches there were.
    """
    handles = []
    if look is not None:

        def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(quantizer, Quantizer)
            look(quantizer, args[0].detach())

        handles = [t.quantizer.register_forward_hook(hook) for t in quantized_tensors(model)]
    used = 0
    try:
        with evaluating(model):
            for batch in batches:
                model(*(batch if isinstance(batch, tuple | list) else (batch,)))
                used += 1
    finally:
        for handle in handles:
            handle.remove()
    return used


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, all modules are in eval mode; afterwards each is in the mode that it was in."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag
