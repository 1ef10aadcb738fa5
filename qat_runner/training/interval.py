"""Steps of training whose figures have not been read from the device yet."""

import time

import torch
from torch import Tensor


class Interval:
    """The steps since their losses were last read; they wait on the device till then.

    Losses wait in one tensor. A tensor each, which lasts, would be cut out of the memory that a large one has just
    freed, so that the next large one finds no room there: memory would grow by the largest tensor at each step.

    Args:
        steps: as many as there may be.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._losses: Tensor | None = None
        self.rates: list[float] = []
        self._excess: Tensor | None = None
        self._began = time.perf_counter()

    def add(self, loss: Tensor, lr: float, excess: Tensor | None) -> None:
        """A step: its mean loss [], its learning rate, and what a warm start cost it, [2]."""
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
        """Of the steps, in order: [steps]."""
        return torch.empty(0) if self._losses is None else self._losses[: len(self.rates)]

    @property
    def excess(self) -> Tensor:
        """What warm starts cost the steps, [steps, 2]; empty where that is not measured."""
        return torch.empty(0) if self._excess is None else self._excess[: len(self.rates)]

    def seconds(self) -> float:
        return time.perf_counter() - self._began
