"""Quantized attention of transformers' networks: both operands of both batched matrix products.

transformers lets a network look up its attention by name. A function under our name computes the attention that the
network itself calls "eager", whatever arguments that takes, with the two products that insertion has put into each
attention module in place of its two matrix products. So nothing of any network is copied here.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.layers import QuantMatmul
from qat_runner.insertion.own_products import PRODUCTS, ProductsOf

NAME = "qat_runner"
"""Under which the function is known to transformers."""

EAGER = "eager"
"""What transformers calls the attention that a network writes out itself."""

OWN = "eager_attention"
"""Attribute of an attention module whose products are quantized: the function that it calls "eager"."""

Attention = Callable[..., tuple[Tensor, Tensor]]
"""A function of transformers' attention interface."""


class OwnAttention:
    """The function that a network calls its "eager" attention; where one is, transformers knows of ours.

    Args:
        function: of transformers' attention interface.
    """

    def __init__(self, function: Attention) -> None:
        self.function = function
        _register()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnAttention, (self.function,)  # so a network that is unpickled elsewhere registers it there


def attention_of(model: nn.Module) -> set[str]:
    """The names of the attention that networks of transformers in a model compute; none where there are no such."""
    asking = [network for network in _networks(model) if any(map(_own_attention, network.modules()))]
    return {str(network.config._attn_implementation) for network in asking}


def modules_served(model: nn.Module) -> set[nn.Module]:
    """The attention modules that transformers' interface serves."""
    return {m for network in _networks(model) for m in network.modules() if _own_attention(m)}


def quantize_attention(model: nn.Module) -> None:
    """Give every attention module of transformers' networks its two products, without quantizers, and let them be used.

    The networks get configs of their own, since others may share theirs.

    Raises:
        ValueError: a network does more for attention of some names than to call it, so ours would miss that; or it has
            something else by the name of a product.
    """
    networks = list(_networks(model))
    modules = {module: own for network in networks for module in network.modules() if (own := _own_attention(module))}
    if not modules:
        return
    for network in networks:
        for name, module in network.named_modules():
            if module in modules and (taken := [product for product in PRODUCTS if hasattr(module, product)]):
                raise ValueError(
                    f"{name} ({type(module).__name__}) calls something of its own {' and '.join(taken)}: this "
                    f"attention cannot be quantized"
                )
            if module in modules and _goes_by_name(module):
                raise ValueError(
                    f"{name} ({type(module).__name__}) does more for attention called 'eager' than to call it: this "
                    f"attention cannot be quantized"
                )
    for module, own in modules.items():
        setattr(module, OWN, OwnAttention(own))
        for name, operands in PRODUCTS.items():
            module.add_module(name, QuantMatmul(operands).train(module.training))
    _own_configs(networks)
    for network in networks:
        network.attention_before = network.config._attn_implementation
    for network in networks:
        network.set_attn_implementation(NAME)


def restore_attention(model: nn.Module) -> None:
    """Undo `quantize_attention`, but for the configs, which stay the networks' own."""
    for module in model.modules():
        for name in (*PRODUCTS, OWN) if OWN in vars(module) else ():
            delattr(module, name)
    for network in _networks(model):
        if "attention_before" in vars(network):  # those inside are set as well, and then to their own
            network.set_attn_implementation(network.attention_before)
            del network.attention_before


@contextmanager
def attention_as(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """While open, networks of transformers compute another attention than the quantized one.

    Args:
        model: after `quantize_attention`.
        name: of that attention; None: the one that each network had before.
    """
    networks = [network for network in _networks(model) if "attention_before" in vars(network)]
    try:
        for network in networks:
            network.set_attn_implementation(name or network.attention_before)
        yield
    finally:
        for network in networks:
            network.set_attn_implementation(NAME)


def _networks(model: nn.Module) -> Iterator[Any]:
    """The networks of transformers that follow its attention interface, outermost first."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            yield module


def _own_attention(module: nn.Module) -> Attention | None:
    """The "eager" attention of a module that asks transformers' interface for its attention; None for any other.

    Its class says which it is: `ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)`.
    """
    for function in _functions(module):
        names = function.__code__.co_names
        if "ALL_ATTENTION_FUNCTIONS" in names:
            own = next((name for name in names if name.endswith("eager_attention_forward")), "")
            attention: Attention | None = function.__globals__.get(own)
            return attention
    return None


def _goes_by_name(module: nn.Module) -> bool:
    """Whether a module does more for attention of some names, such as ("eager", "sdpa"), than to call it."""
    constants = [constant for function in _functions(module) for constant in function.__code__.co_consts]
    return any(isinstance(constant, tuple) and EAGER in constant for constant in constants)


def _functions(module: nn.Module) -> Iterator[Any]:
    """The functions that a module's class consists of, without their decorators."""
    for member in (value for ancestor in type(module).__mro__ for value in vars(ancestor).values() if callable(value)):
        function = inspect.unwrap(member)
        if inspect.isfunction(function):
            yield function


def _own_configs(networks: Sequence[Any]) -> None:
    """Copy the configs that modules of networks hold; which of them hold the same one stays as it is."""
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    for module in {module: None for network in networks for module in network.modules()}:
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, copies))


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


def quantized_attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Attention by transformers' interface: the network's own "eager" one, with the module's products in it.

    Without quantizers it is that attention bit for bit, with all that it adds to softmax(Q K^T) V: position biases,
    sinks, soft caps, what the network may think of next.

    Args:
        module: the attention module, with the products of PRODUCTS.
        args, kwargs: query [N, H, L, D], key and value [N, H / groups, L', D], mask, and all else that the network
            gives to its attention.

    Returns:
        [N, L, H, D], and the probabilities [N, H, L, L'].
    """
    if not hasattr(module, OWN):
        what = type(module).__name__
        raise RuntimeError(f"{what} takes its attention from transformers in a way that is unknown: it has no products")
    with ProductsOf(module):
        return module.eager_attention.function(module, *args, **kwargs)  # type: ignore[no-any-return]
