"""Recording which operations are called, on a machine without a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = frozenset(
    (
        *(aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero, aten.allclose),
        *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount, aten.argwhere),
    )
)
"""Operations that wait for the GPU, because Python or the size of the output depends on their result."""
LAUNCHING_NOTHING = frozenset((aten.detach, aten.empty, aten.empty_like, aten.lift_fresh, aten._reshape_alias))
"""Operations that are not views and yet launch no kernel."""


class Watch(TorchDispatchMode):
    """While open, records the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket is aten.index and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if func.overloadpacket in WAITING or by_mask:
            self.waited.append(str(func))
        if not func.is_view and func.overloadpacket not in LAUNCHING_NOTHING:
            self.launched.append(str(func))
        return func(*args, **(kwargs or {}))
