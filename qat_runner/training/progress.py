"""The live progress bar: one for a whole run, hidden unless standard error is a terminal."""

import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

from qat_runner.tasks import Totals


class Progress:
    """Shows epoch, loss, first metric, samples per second and remaining time, for training and validation together.

    Args:
        epochs: total number of epochs.
        samples_per_epoch: training and validation samples per epoch.
        start_epoch: number of epochs already done.
        unit: short name of a sample, such as "img".
        live: whether to draw the bar; by default only if standard error is a terminal.
    """

    def __init__(
        self, epochs: int, samples_per_epoch: int, start_epoch: int, unit: str = "img", live: bool | None = None
    ) -> None:
        self.live = sys.stderr.isatty() if live is None else live
        self._bar = tqdm(
            total=epochs * samples_per_epoch,
            initial=start_epoch * samples_per_epoch,
            unit=unit,
            unit_scale=True,
            disable=not self.live,
            dynamic_ncols=True,
            leave=False,
        )
        self._interval = 1.0 if self.live else 30.0
        self.begin("")

    def begin(self, what: str) -> None:
        """Begin a new phase, such as "epoch 3/8"."""
        self._bar.set_description(what)
        self._bar.set_postfix_str("")
        self._last_look = time.monotonic() - self._interval / 2  # so that the first look comes early
        self._pinned: Tensor | None = None

    def step(self, samples: int, totals: Totals) -> bool:
        """Count a batch and read the totals from time to time; return False if the loss has become NaN or infinite."""
        self._bar.update(samples)
        now = time.monotonic()
        if now - self._last_look < self._interval:
            return True
        self._last_look = now
        shown = self._look(totals.sums)
        if shown is None or shown[-1] == 0:
            return True
        figures = totals.figures(shown.tolist())
        loss, first = figures["loss"], totals.names[0]
        self._bar.set_postfix_str(f"loss {loss:.3f}, {first} {figures[first]:.2f} %")
        return loss - loss == 0.0

    def _look(self, sums: Tensor) -> Tensor | None:
        """Return the sums; on a GPU those of the previous look, so that nothing waits for the device."""
        if sums.device.type != "cuda":
            return sums.cpu()
        previous = None if self._pinned is None else self._pinned.clone()
        if self._pinned is None:
            self._pinned = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        self._pinned.copy_(sums, non_blocking=True)
        return previous

    def close(self) -> None:
        self._bar.close()
