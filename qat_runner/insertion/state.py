"""Upgrade checkpoints that were written before quantizers kept all of their state."""

from typing import Any

import torch


def upgrade(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a run's checkpoint in the present format.

    In old versions, a run whose activations were static from some epoch on recorded that next to the network's state
    (as "held"), and not in the quantizers.

    Args:
        checkpoint: of a run, of any version; changed in place.
    """
    if checkpoint.get("state", {}).pop("held", False):
        model = checkpoint["model"]
        quantizers = [key.removesuffix(".grid") for key in model if key.endswith("_quantizer.grid")]
        model |= {f"{name}.static": torch.ones(()) for name in quantizers if not name.endswith("weight_quantizer")}
    return checkpoint
