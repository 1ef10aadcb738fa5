"""Weights that flip between two codes, measured and frozen.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022. A weight whose best value
lies between two levels is pushed across the threshold between them again and again. With places (see `latent`) in the
role of codes, at step t

    o_t = [the place has changed, in the direction opposite to that of its last change]
    f_t = m o_t + (1 - m) f_(t-1)

and an element oscillates where f is above a threshold. Iterative weight freezing (section 4.3) has each element whose f
is above another threshold stay from then on at its mean place, round(e_t), e_t = m place_t + (1 - m) e_(t-1), e_0 =
place_0. That threshold falls by half a cosine from the start of training to its end, so that the worst are frozen
first, and the others may still find where to go.

Places are those of the forward passes of a step: of the weights before the optimizer moves them, by the scalars that
they were quantized with. Where the scalars are solved anew at each step, or learned, a frozen element keeps its place,
and not its value: after each step it is put on the level that its place has by the latest scalars, so that it follows
them. Rounding by the next ones gives the same place as long as these differ by less than half a step there, which for
4 bits is 6 %. Frozen elements have no gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import Config
from qat_runner.training.latent import LatentWeight, latent_weights


def half_cosine(start: float, end: float, progress: float) -> float:
    """From start to end, as progress goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class Oscillations:
    """Follows the places of weights from step to step; nothing waits for the device.

    Args:
        weights: of one device, at least one.
        momentum: m.
        threshold: of f, above which an element oscillates.
        freezes: the thresholds at the start and at the end of training above which elements are frozen; None: none is.
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
        """Take in a step whose gradients are there, before the weights move.

        Args:
            progress: of training, 0 to below 1.
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
    def hold(self) -> None:
        """Put what is frozen back on its level, after the weights have moved."""
        if self.freezes is None:
            return
        for weight, frozen, mean in zip(self.weights, self._apart("frozen"), self._apart("mean"), strict=True):
            weight.x.copy_((mean * weight.step).to(weight.x.dtype).where(frozen, weight.x))

    def _apart(self, name: str) -> list[Tensor]:
        """A part of the state, weight by weight, in their shapes."""
        parts = self.state[name].split(self.sizes)
        return [part.view(weight.x.shape) for part, weight in zip(parts, self.weights, strict=True)]

    def rows(self) -> list[dict[str, Any]]:
        """Weight by weight the percentage of elements that oscillate, and are frozen. Waits for the device once."""
        oscillating = [part > self.threshold for part in self._apart("frequency")]
        frozen = self._apart("frozen") if self.freezes else [torch.zeros_like(part) for part in oscillating]
        shares = [torch.stack([100 * t.double().mean() for t in parts]) for parts in (oscillating, frozen)]
        return [
            {"layer": weight.layer, "elements": weight.x.numel(), "oscillating": one, "frozen": other}
            for weight, (one, other) in zip(self.weights, torch.stack(shares, 1).tolist(), strict=True)
        ]

    def of_all(self) -> dict[str, float]:
        """The same of the elements of all weights together, as "oscillating_weights" and "frozen_weights"."""
        rows, count = self.rows(), sum(self.sizes)
        return {
            f"{key}_weights": sum(row[key] * row["elements"] for row in rows) / count
            for key in ("oscillating", "frozen")
        }

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is that of other weights, or of another kind.
        """
        if saved.keys() != self.state.keys():
            raise ValueError(f"oscillations: must have {', '.join(self.state)}, not {', '.join(saved) or 'nothing'}")
        for name, own in self.state.items():
            if (saved[name].dtype, saved[name].shape) != (own.dtype, own.shape):
                raise ValueError(f"oscillations.{name}: must be of shape {list(own.shape)}, {own.dtype}")
        self.state = {name: saved[name].to(own.device) for name, own in self.state.items()}


def oscillations_of(config: Config, model: nn.Module) -> Oscillations | None:
    """What a resolved config asks for, of the weights of its model."""
    how = config.oscillations
    if not (config.quantized_training and how.watching):
        return None
    freezes = None if how.freeze_to is None else (how.freeze_from, how.freeze_to)
    return Oscillations(latent_weights(model, how.max_bits), how.momentum, how.threshold, freezes)
