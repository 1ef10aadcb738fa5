"""Training steps whose losses have not been read from the device yet."""

import time

import torch
from torch import Tensor


class Interval:
    """The steps since losses were last read; their losses stay on the device until they are read.

    All losses are kept in one tensor. If each loss were a tensor of its own, the allocator would place it in a block
    that a large tensor has just freed, and the next large tensor would no longer fit there: memory would grow by the
    size of the largest tensor at each step.

    Args:
        steps: the largest possible number of steps.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._losses: Tensor | None = None
        self.rates: list[float] = []
        self._excess: Tensor | None = None
        self._began = time.perf_counter()

    def add(self, loss: Tensor, lr: float, excess: Tensor | None) -> None:
        """Add a step: its mean loss [], its learning rate, and the excess MSE of its warm starts, [2], if measured."""
        if self._losses is None:
            self._losses = loss.new_empty(self._steps)
        self._losses[len(self.rates)] = loss
        if excess is not None:
            if self._excess is None:
                self._excess = excess.new_empty(self._steps, *excess.shape)
            self._excess[len(self.rates)] = excess
        self.rates.append(lr)

    @property
    def losses(self) -> Tensor:
        """The losses of the steps, in order: [steps]."""
        return torch.empty(0) if self._losses is None else self._losses[: len(self.rates)]

    @property
    def excess(self) -> Tensor:
        """The excess MSE of the warm starts of the steps, [steps, 2]; empty if it is not measured."""
        return torch.empty(0) if self._excess is None else self._excess[: len(self.rates)]

    def seconds(self) -> float:
        return time.perf_counter() - self._began
