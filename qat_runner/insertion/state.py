"""What becomes of checkpoints that were written before quantizers kept all of their state."""

from typing import Any

import torch


def upgrade(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A run's checkpoint as it would be written now.

    Once, a run whose activations were static from some epoch on said so beside the network's state ("held"), and the
    quantizers did not know.

    Args:
        checkpoint: of a run, of any version; changed in place.
    """
    if checkpoint.get("state", {}).pop("held", False):
        model = checkpoint["model"]
        quantizers = [key.removesuffix(".grid") for key in model if key.endswith("_quantizer.grid")]
        model |= {f"{name}.static": torch.ones(()) for name in quantizers if not name.endswith("weight_quantizer")}
    return checkpoint
