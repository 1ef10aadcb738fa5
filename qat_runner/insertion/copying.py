"""Deep copies of networks, and the check that a copy computes nothing with the original."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from qat_runner.insertion.layers import has_own_forward, takes_hooks


@contextmanager
def not_called(model: nn.Module, by: nn.Module) -> Iterator[None]:
    """Context manager under which no module of a network may be called, while a deep copy of the network runs.

    A forward that was set on an instance may run the original, since Python does not copy functions.

    Args:
        model: the original.
        by: its copy; modules that both share may be called.

    Raises:
        ValueError: a module of the original was called.
    """
    shared = {*by.modules()}
    own = [name or type(m).__name__ for name, m in model.named_modules() if has_own_forward(m)]
    where = f"a forward that was set on the instance of {' or '.join(own)}" if own else "a function that it holds"
    refuse = partial(_refuse, where)
    called = [module for module in model.modules() if module not in shared and takes_hooks(module)]
    handles = [module.register_forward_pre_hook(refuse) for module in called]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse(where: str, module: nn.Module, args: object) -> None:
    raise ValueError(
        f"a copy of the network would still run the original through {where}: define it in the class instead, or "
        f"delete it if it only runs the forward of the class, as a compiled one does (del module.forward)"
    )
