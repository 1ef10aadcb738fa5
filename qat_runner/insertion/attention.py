"""Quantized attention of transformers' networks: both operands of both batched matrix products.

transformers lets a network look up its attention by name, so nothing of the network is copied: a function under our
name computes softmax(Q K^T) V with the two products that insertion has put into each attention module.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.layers import QuantMatmul

NAME = "qat_runner"
"""Under which the function is known to transformers."""

PRODUCTS = {"scores": ("query", "key"), "context": ("probabilities", "value")}
"""Submodule of an attention module -> names of its operands."""


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules, by name, whose products can be quantized; none where transformers is not at work."""
    found: dict[str, nn.Module] = {}
    for prefix, network in _networks(model):
        for name, module in network.named_modules():
            if hasattr(module, "is_causal") and hasattr(module, "scaling"):  # what the interface hands to a function
                found[f"{prefix}.{name}" if prefix else name] = module
    return found


def quantize_attention(model: nn.Module) -> None:
    """Give every attention module its two products, without quantizers as yet, and let them be used."""
    modules = attention_modules(model)
    for module in modules.values():
        for name, operands in PRODUCTS.items():
            module.add_module(name, QuantMatmul(operands).train(module.training))
    if modules:
        _register()
    for _, network in _networks(model):
        if network.config._attn_implementation != NAME:
            network.attention_before = network.config._attn_implementation
            network.set_attn_implementation(NAME)


def restore_attention(model: nn.Module) -> None:
    """Undo `quantize_attention`."""
    for module in attention_modules(model).values():
        for name in PRODUCTS:
            if isinstance(getattr(module, name, None), QuantMatmul):
                delattr(module, name)
    for _, network in _networks(model):
        if hasattr(network, "attention_before"):
            network.set_attn_implementation(network.attention_before)
            del network.attention_before


def _networks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The networks of transformers that follow its attention interface, by name, outermost first."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            yield name, module


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, quantized_attention)
    AttentionMaskInterface.register(NAME, added_to_scores)


def added_to_scores(*, device: torch.device, allow_is_bidirectional_skip: bool = False, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' "eager" attention, or None where nothing is masked.

    To see that nothing is, one would wait for the device, unless it is a CPU: elsewhere zeros are added.

    Args:
        device: of the mask.
        allow_is_bidirectional_skip: whether it may be None.
        kwargs: as transformers' interface has them.
    """
    from transformers.masking_utils import eager_mask

    skip = allow_is_bidirectional_skip and device.type == "cpu"
    mask: Tensor | None = eager_mask(device=device, allow_is_bidirectional_skip=skip, **kwargs)
    return mask


def quantized_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by transformers' interface; without quantizers bit for bit its own "eager" one.

    Args:
        module: the attention module, with the products of PRODUCTS.
        query: [N, H, L, D].
        key, value: [N, H / groups, L', D].
        attention_mask: added to the scores, broadcast to [N, H, L, L'].
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: probability that a probability is dropped.

    Returns:
        [N, L, H, D], and the probabilities [N, H, L, L'].
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = module.scores(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    # In float32 also in half precision, as is usual; a no-op in float32.
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return module.context(probabilities, value).transpose(1, 2).contiguous(), probabilities
