"""Solves the clipping scalars of a tensor once if several layers use it, such as query, key and value."""

import weakref
from collections import deque
from typing import NamedTuple

from torch import Tensor

LATEST = 4
"""Number of tensors that are remembered; few others are quantized between two uses of the same tensor."""
WORTH = 1 << 14
"""Minimum number of elements of a remembered tensor: solving for a smaller one takes less time than the lookup."""


class _Solved(NamedTuple):
    by: int
    x: "weakref.ref[Tensor]"
    version: int
    how: object
    s: Tensor


class LatestScalars:
    """The scalars of the last quantized tensors, for reuse by quantizers that would solve the same problem again."""

    def __init__(self) -> None:
        self._solved: deque[_Solved] = deque(maxlen=LATEST)

    def note(self, by: object, x: Tensor, how: object, s: Tensor) -> None:
        """Store the scalars of the current values of x.

        Parameters are not stored, since fused optimizers write to them without changing their version.

        Args:
            by: the quantizer that found them; only its id is kept.
            x: the tensor, of which only a weak reference is kept.
            how: everything else that the scalars depend on.
            s: the scalars.
        """
        if x.numel() >= WORTH and not (x.is_inference() or (x.is_leaf and x.requires_grad)):
            self._solved.appendleft(_Solved(id(by), weakref.ref(x), x._version, how, s))

    def find(self, by: object, x: Tensor, how: object) -> Tensor | None:
        """Return the latest scalars that another quantizer stored for this x, unmodified since, and the same `how`."""
        for solved in tuple(self._solved):  # a copy, since other threads may call `note` meanwhile
            if solved.x() is x and solved.by != id(by) and solved.version == x._version and solved.how == how:
                return solved.s
        return None
