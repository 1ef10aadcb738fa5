"""Measuring and freezing weights that oscillate between two codes.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022. A weight whose optimal value
lies between two levels is pushed across the threshold between them again and again. With places (see `latent`) in the
role of codes, at step t

    o_t = [the place has changed, in the direction opposite to that of its last change]
    f_t = m o_t + (1 - m) f_(t-1)

An element oscillates if its f is above a threshold. Iterative weight freezing (section 4.3) fixes each element whose f
exceeds a second threshold at its mean place, round(e_t), where e_t = m place_t + (1 - m) e_(t-1) and e_0 = place_0. The
second threshold decreases along half a cosine from the start to the end of training, so that the strongest oscillations
are frozen first and the other weights can still settle.

Places are taken from the forward passes of a step: from the weights before the optimizer updates them, with the
clipping scalars that they were quantized with. If the scalars are solved at each step, or learned, a frozen element
keeps its place rather than its value: after each step it is set to the level of its place under the latest scalars.
Rounding with the scalars of the next step gives the same place as long as the two differ by less than half a step size
at that level, which is 6 % for 4 bits. Frozen elements have no gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import Config
from qat_runner.training.latent import LatentWeight, latent_weights


def half_cosine(start: float, end: float, progress: float) -> float:
    """Interpolate from start to end along half a cosine, as progress goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class Oscillations:
    """Tracks the places of weights from step to step. No operation waits for the device.

    Args:
        weights: at least one weight, all on one device.
        momentum: m in the equations above.
        threshold: an element oscillates if its f is above this value.
        freezes: the freezing thresholds at the start and at the end of training; None disables freezing.
    """

    def __init__(
        self,
        weights: Sequence[LatentWeight],
        momentum: float,
        threshold: float,
        freezes: tuple[float, float] | None = None,
    ) -> None:
        self.weights, self.momentum, self.threshold, self.freezes = weights, momentum, threshold, freezes
        self.sizes = [weight.x.numel() for weight in weights]
        empty = torch.zeros(sum(self.sizes), device=weights[0].x.device)
        self.state = {"seen": empty.new_zeros(()), "place": empty, "direction": empty.to(torch.int8)}
        self.state["frequency"] = empty.clone()
        if freezes is not None:
            self.state |= {"mean": empty.clone(), "frozen": empty.bool()}

    @torch.no_grad()
    def observe(self, progress: float) -> None:
        """Record a step after its backward pass and before the optimizer updates the weights.

        Args:
            progress: position in training, at least 0 and below 1.
        """
        state = self.state
        place = torch.cat([weight.places().reshape(-1).float() for weight in self.weights])
        change = ((place - state["place"]).sign() * state["seen"]).to(torch.int8)
        flipped = change * state["direction"] < 0
        state["frequency"].lerp_(flipped.float(), self.momentum)
        state["direction"] = change.where(change != 0, state["direction"])
        state["place"] = place
        if self.freezes is not None:
            self._freeze(half_cosine(*self.freezes, progress))
        state["seen"].fill_(1)

    def _freeze(self, threshold: float) -> None:
        state = self.state
        begun = state["seen"] > 0
        mean = state["mean"].lerp(state["place"], self.momentum).where(begun, state["place"])
        mean = state["mean"].where(state["frozen"], mean)
        due = (state["frequency"] > threshold) & ~state["frozen"]
        state["mean"] = mean.round().where(due, mean)
        state["frozen"] = state["frozen"] | due
        for weight, frozen in zip(self.weights, self._apart("frozen"), strict=True):
            if weight.x.grad is not None:
                weight.x.grad.masked_fill_(frozen, 0)

    @torch.no_grad()
    def restore_frozen(self) -> None:
        """Set frozen elements back to their levels after the optimizer has updated the weights."""
        if self.freezes is None:
            return
        for weight, frozen, mean in zip(self.weights, self._apart("frozen"), self._apart("mean"), strict=True):
            weight.x.copy_((mean * weight.step).to(weight.x.dtype).where(frozen, weight.x))

    def _apart(self, name: str) -> list[Tensor]:
        """Split one tensor of the state into one tensor per weight, each in the shape of its weight."""
        parts = self.state[name].split(self.sizes)
        return [part.view(weight.x.shape) for part, weight in zip(parts, self.weights, strict=True)]

    def rows(self) -> list[dict[str, Any]]:
        """Return, for each weight, the percentages of oscillating and of frozen elements. Waits for the device once."""
        oscillating = [part > self.threshold for part in self._apart("frequency")]
        frozen = self._apart("frozen") if self.freezes else [torch.zeros_like(part) for part in oscillating]
        shares = [torch.stack([100 * t.double().mean() for t in parts]) for parts in (oscillating, frozen)]
        return [
            {"layer": weight.layer, "elements": weight.x.numel(), "oscillating": one, "frozen": other}
            for weight, (one, other) in zip(self.weights, torch.stack(shares, 1).tolist(), strict=True)
        ]

    def totals(self) -> dict[str, float]:
        """Return the same percentages over all weights together, as "oscillating_weights" and "frozen_weights"."""
        rows, count = self.rows(), sum(self.sizes)
        return {
            f"{key}_weights": sum(row[key] * row["elements"] for row in rows) / count
            for key in ("oscillating", "frozen")
        }

    def load(self, saved: dict[str, Tensor]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state belongs to other weights, or lacks or adds tensors.
        """
        if saved.keys() != self.state.keys():
            raise ValueError(f"oscillations: must have {', '.join(self.state)}, not {', '.join(saved) or 'nothing'}")
        for name, own in self.state.items():
            if (saved[name].dtype, saved[name].shape) != (own.dtype, own.shape):
                raise ValueError(f"oscillations.{name}: must be of shape {list(own.shape)}, {own.dtype}")
        self.state = {name: saved[name].to(own.device) for name, own in self.state.items()}


def oscillations_of(config: Config, model: nn.Module) -> Oscillations | None:
    """Create the `Oscillations` that a resolved config asks for, or return None if it asks for none."""
    how = config.oscillations
    if not (config.quantized_training and how.watching):
        return None
    freezes = None if how.freeze_to is None else (how.freeze_from, how.freeze_to)
    return Oscillations(latent_weights(model, how.max_bits), how.momentum, how.threshold, freezes)
