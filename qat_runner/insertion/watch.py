"""Run a network over batches and look at what its quantizers are given."""

from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.insert import quantized_tensors
from qat_runner.insertion.modes import (
    call,
    evaluating,
    explaining_argument_errors,
    inputs_of_batch,
    training_paths_without_trace,
    uncompiled,
)
from qat_runner.insertion.tensors import copies
from qat_runner.quant import Quantizer

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]
"""Each batch is an input tensor, a tuple or list of arguments of forward, or a mapping of their names to arguments."""


@torch.no_grad()
def watch(
    model: nn.Module,
    batches: Batches,
    look: Callable[[Quantizer, Tensor], None] | None = None,
    unreached: Callable[[], Set[Quantizer]] = frozenset,
) -> int:
    """Run a model over batches, in eval mode.

    Args:
        model: with quantizers; afterwards its modules return to their previous modes.
        batches: see above.
        look: called after each call of a quantizer, with the quantizer and the tensor that it was given, unless the
            tensor has no elements; None: nothing is called.
        unreached: called after each batch; returns the quantizers that have not been called yet but should be. If there
            are any, the batch runs once more as in training, for layers that are used only there, and `look` is called
            for these quantizers only. If the network needs more for that than the batch has (targets, say), that pass
            is skipped.

    Returns:
        The number of batches.

    Raises:
        TypeError: `batches` is a tensor, which would be split into samples; or a batch is more or less than the
            arguments of forward.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches: must be an iterable of batches, not a tensor; pass a single batch as [batch]")
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
            inputs = inputs_of_batch(model, batch)
            again = copies(inputs) if unreached() else None  # the network may write to its inputs
            with evaluating(model), uncompiled(), explaining_argument_errors(model, inputs):
                call(model, inputs)
            used += 1
            shown = unreached() or None
            if shown is not None and again is not None:
                with training_paths_without_trace(model), suppress(Exception):
                    call(model, again)
            shown = None
    finally:
        for handle in handles:
            handle.remove()
    return used
