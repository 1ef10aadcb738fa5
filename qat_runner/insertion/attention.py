"""Quantized attention for networks of transformers: both operands of both batched matrix products.

A network of transformers looks up its attention function by name. A function registered under our name calls the
attention that the network itself defines as "eager", whatever arguments that takes. The two matrix products in it are
computed by the two product modules that insertion has added to each attention module. No code of any network is copied.
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
"""Name under which the function is registered with transformers."""

EAGER = "eager"
"""Name that transformers gives to the attention that a network implements itself, in plain PyTorch."""

OWN = "eager_attention"
"""Attribute of an attention module whose products are quantized: the network's own "eager" function."""

Attention = Callable[..., tuple[Tensor, Tensor]]
"""A function of transformers' attention interface."""


class OwnAttention:
    """A network's own "eager" attention function; creating one registers our function with transformers.

    Args:
        function: of transformers' attention interface.
        before: the implementation that the config of the attention module named; None: it named none.
    """

    def __init__(self, function: Attention, before: str | None = None) -> None:
        self.function, self.before = function, before
        _register()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnAttention, (self.function, self.before)  # so that unpickling in another process registers it there


def attention_of(model: nn.Module) -> set[str]:
    """Return the names of the attention implementations that networks of transformers in a model use."""
    asking = [network for network in _networks(model) if any(map(_own_attention, network.modules()))]
    own = {_implementation(module) for module in modules_served(model)} - {None}
    return {str(name) for name in own | {network.config._attn_implementation for network in asking}}


def _implementation(module: nn.Module) -> str | None:
    """Return the name of the attention implementation in the config of a module; None if it has none."""
    name: str | None = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name


def modules_served(model: nn.Module) -> set[nn.Module]:
    """Return the attention modules that use transformers' attention interface."""
    return {m for network in _networks(model) for m in network.modules() if _own_attention(m)}


def quantize_attention(model: nn.Module) -> None:
    """Give every attention module of transformers' networks its two products, without quantizers, and switch to them.

    The networks get their own copies of their configs, since other networks may share these.

    Raises:
        ValueError: a network does more for attention of certain names than to call it, which our function would miss;
            or an attention module already has an attribute with the name of a product.
    """
    networks = list(_networks(model))
    modules = {module: own for network in networks for module in network.modules() if (own := _own_attention(module))}
    if not modules:
        return
    for network in networks:
        for name, module in network.named_modules():
            if module in modules and (taken := [product for product in PRODUCTS if hasattr(module, product)]):
                raise ValueError(
                    f"{name} ({type(module).__name__}) already uses {' and '.join(taken)} as an attribute name: this "
                    f"attention cannot be quantized"
                )
            if module in modules and _goes_by_name(module):
                raise ValueError(
                    f"{name} ({type(module).__name__}) has code that depends on its attention being named 'eager': "
                    f"this attention cannot be quantized"
                )
    for module, own in modules.items():
        setattr(module, OWN, OwnAttention(own, _implementation(module)))
        for name, operands in PRODUCTS.items():
            module.add_module(name, QuantMatmul(operands).train(module.training))
    _own_configs(networks)
    for network in networks:
        network.attention_before = network.config._attn_implementation
    for network in networks:
        _switch(network, NAME)


def _switch(network: Any, name: str | None) -> None:
    """Make a network use another attention, also where a quantized module has a config of its own (ViTMAE).

    Args:
        network: of transformers, after `quantize_attention`.
        name: of that attention; None: what the network, and the config of each module, named before.
    """
    network.set_attn_implementation(name or network.attention_before)
    for module in network.modules():
        if OWN in vars(module) and hasattr(getattr(module, "config", None), "_attn_implementation"):
            before = module.eager_attention.before or network.attention_before
            module.config._attn_implementation = name or before


def restore_attention(model: nn.Module) -> None:
    """Undo `quantize_attention`, except that the networks keep their own configs."""
    for network in _networks(model):
        if "attention_before" in vars(network):  # also sets nested networks, whose turn comes after
            _switch(network, None)
            del network.attention_before
    for module in model.modules():
        for name in (*PRODUCTS, OWN) if OWN in vars(module) else ():
            delattr(module, name)


@contextmanager
def attention_as(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Context manager under which networks of transformers use another attention than the quantized one.

    Args:
        model: after `quantize_attention`.
        name: of that attention; None: what each network, and each module with a config of its own, had before.
    """
    networks = [network for network in _networks(model) if "attention_before" in vars(network)]
    try:
        for network in networks:
            _switch(network, name)
        yield
    finally:
        for network in networks:
            _switch(network, NAME)


def _networks(model: nn.Module) -> Iterator[Any]:
    """Yield the networks of transformers that use its attention interface, outermost first."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            yield module


def _own_attention(module: nn.Module) -> Attention | None:
    """Return the "eager" attention of a module that looks up its attention in transformers; None for any other.

    It is found in the code of the module's class, where it is an argument:
    `ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)`.
    """
    for function in _functions(module):
        names = function.__code__.co_names
        if "ALL_ATTENTION_FUNCTIONS" in names:
            own = next((name for name in names if name.endswith("eager_attention_forward")), "")
            attention: Attention | None = function.__globals__.get(own)
            return attention
    return None


def _goes_by_name(module: nn.Module) -> bool:
    """Whether a module does more for attention of certain names, such as ("eager", "sdpa"), than to call it."""
    constants = [constant for function in _functions(module) for constant in function.__code__.co_consts]
    return any(isinstance(constant, tuple) and EAGER in constant for constant in constants)


def _functions(module: nn.Module) -> Iterator[Any]:
    """Yield the functions that a module's class and its bases define, without their decorators."""
    for member in (value for ancestor in type(module).__mro__ for value in vars(ancestor).values() if callable(value)):
        function = inspect.unwrap(member)
        if inspect.isfunction(function):
            yield function


def _own_configs(networks: Sequence[Any]) -> None:
    """Copy the configs that modules of networks hold; modules that shared a config share its copy."""
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
    """Return the mask of transformers' "eager" attention, which is added to the scores, or None if nothing is masked.

    Finding out that nothing is masked means waiting for the device, unless it is a CPU. On other devices a mask of
    zeros is returned instead.

    Args:
        device: of the mask.
        allow_is_bidirectional_skip: whether None may be returned.
        kwargs: further arguments of transformers' interface.
    """
    from transformers.masking_utils import eager_mask

    skip = allow_is_bidirectional_skip and device.type == "cpu"
    mask: Tensor | None = eager_mask(device=device, allow_is_bidirectional_skip=skip, **kwargs)
    return mask


def quantized_attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Compute attention for transformers' interface: the network's own "eager" function, with the module's products.

    Without quantizers the result is bit-identical to that function, including everything it adds to softmax(Q K^T) V:
    position biases, sinks, soft caps, or whatever else the network defines.

    Args:
        module: the attention module, with the products of PRODUCTS.
        args, kwargs: query [N, H, L, D], key and value [N, H / groups, L', D], mask, and all else that the network
            passes to its attention.

    Returns:
        [N, L, H, D], and the probabilities [N, H, L, L'].
    """
    if not hasattr(module, OWN):
        what = type(module).__name__
        raise RuntimeError(f"{what} looks up its attention in transformers in an unknown way: it has no products")
    with ProductsOf(module):
        return module.eager_attention.function(module, *args, **kwargs)  # type: ignore[no-any-return]
