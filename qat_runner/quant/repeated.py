"""A tensor that is given to several layers, such as to query, key and value, has its clipping scalars solved once."""

import weakref
from collections import deque
from typing import NamedTuple

from torch import Tensor

LATEST = 4
"""Tensors that are kept in mind; between two uses of one, few others are quantized."""
WORTH = 1 << 14
"""Elements, at least, of a tensor that is kept in mind: a smaller one is solved in less time than it is looked for."""


class _Solved(NamedTuple):
    by: int
    x: "weakref.ref[Tensor]"
    version: int
    how: object
    s: Tensor


class LatestScalars:
    """The scalars of the tensors that were quantized last, for whoever is to find the same on the same."""

    def __init__(self) -> None:
        self._solved: deque[_Solved] = deque(maxlen=LATEST)

    def note(self, by: object, x: Tensor, how: object, s: Tensor) -> None:
        """Scalars of x, as it is now, that one found in a certain way; neither one nor x is kept alive by that.

        A parameter is not noted: fused optimizers write to it without a trace.
        """
        if x.numel() >= WORTH and not (x.is_inference() or (x.is_leaf and x.requires_grad)):
            self._solved.appendleft(_Solved(id(by), weakref.ref(x), x._version, how, s))

    def find(self, by: object, x: Tensor, how: object) -> Tensor | None:
        """What another one noted last of this very tensor, not written to since, and in the same way."""
        for solved in tuple(self._solved):  # in which other threads may note meanwhile
            if solved.x() is x and solved.by != id(by) and solved.version == x._version and solved.how == how:
                return solved.s
        return None
