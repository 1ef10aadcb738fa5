"""Running a network over batches in order to look at what its quantizers are given."""

from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.insert import quantized_tensors
from qat_runner.insertion.modes import arguments_told, evaluating, taking_the_ways_of_training
from qat_runner.insertion.tensors import copies
from qat_runner.quant import Quantizer

Batches = Iterable[Tensor | tuple[Any, ...]]
"""Each an input tensor, or a tuple of arguments of forward."""


@torch.no_grad()
def watch(
    model: nn.Module,
    batches: Batches,
    look: Callable[[Quantizer, Tensor], None] | None = None,
    unreached: Callable[[], Set[Quantizer]] = frozenset,
) -> int:
    """Run a model over batches, in eval mode.

    Args:
        model: with quantizers; afterwards its modules are in the modes that they were in.
        batches: see above.
        look: is shown each quantizer after each call, and the tensor that it was given, if that has elements; None:
            nobody looks.
        unreached: asked after each batch which quantizers are still waited for. If there are any, the batch is run once
            more, the way training goes, for layers that are used there alone, and these quantizers only are shown. A
            network that needs more for that than it is given (targets, say) is spared it.

    Returns:
        How many batches there were.

    Raises:
        TypeError: a tensor in place of batches, which would be taken apart into samples; or a batch that is more or
            less than the arguments of forward.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches: is a tensor, where a list of batches is wanted; one batch alone is [batch]")
    handles = []
    shown: Set[Quantizer] | None = None  # all
    if look is not None:

        def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(quantizer, Quantizer)
            if args[0].numel() and (shown is None or quantizer in shown):
                look(quantizer, args[0].detach())

        handles = [t.quantizer.register_forward_hook(hook) for t in quantized_tensors(model)]
    used = 0
    try:
        for batch in batches:
            inputs = batch if isinstance(batch, tuple | list) else (batch,)
            again = copies(inputs) if unreached() else None  # the network may write to what it is given
            with evaluating(model), arguments_told(model, inputs):
                model(*inputs)
            used += 1
            shown = unreached() or None
            if shown is not None and again is not None:
                with taking_the_ways_of_training(model), suppress(Exception):
                    model(*again)
            shown = None
    finally:
        for handle in handles:
            handle.remove()
    return used
