"""Prices (estimated sensitivities): what quantizing a tensor to a bit-width costs the network.

| kind     | price of a tensor x at some bit-width, with the error e = Q(x) - x                          |
|----------|---------------------------------------------------------------------------------------------|
| noise    | sum(e^2) / sum(x^2), regardless of how much it affects the network                          |
| gradient | n/2 sum(g^2 e^2), where g is the gradient of the mean loss of n predictions                 |
| measured | how much worse the network is when only this tensor is quantized                            |

The price by gradients is the increase of the loss to second order, provided that errors are independent of one another
and that the Hessian is the Fisher information, which is nearly true of a trained network. An `Objective` defines the
loss, and what "worse" means.

All prices are measured on the full-precision network in eval mode. Clipping scalars are those of the quantizer itself,
solved separately for each bit-width: e is the error at s*, with any clipping method, range or format.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.allocation.objectives import Objective
from qat_runner.insertion.insert import quantized_tensors, quantizers_disabled
from qat_runner.insertion.modes import evaluating
from qat_runner.policy import PRICES
from qat_runner.quant import Quantizer


@dataclass(frozen=True)
class Prices:
    """Prices of tensors at bit-widths, batch by batch."""

    kind: str
    widths: tuple[int, ...]
    batches: dict[str, Tensor]
    """name of a tensor that some batch reaches -> prices, float64 [batches, widths]"""
    noise: dict[str, Tensor]
    """name of a tensor -> noise-to-signal ratio, sum(e^2) / sum(x^2), averaged over the batches that reach it, float64
    [widths]"""

    def __post_init__(self) -> None:
        for name, rows in self.batches.items():
            if not bool(rows.isfinite().all()):
                raise ValueError(f"{name}: its price is not finite")

    @property
    def count(self) -> int:
        """The number of batches."""
        return min((len(rows) for rows in self.batches.values()), default=0)

    def mean(self, of: Sequence[int] | None = None) -> dict[str, dict[int, float]]:
        """Return the mean prices over batches: name of a tensor -> bit-width -> price.

        Args:
            of: indices of the batches, repeated to give some more weight; None: each batch once.
        """
        return {
            name: dict(zip(self.widths, (rows if of is None else rows[list(of)]).mean(0).tolist(), strict=True))
            for name, rows in self.batches.items()
        }


def price(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    widths: Sequence[int],
    kind: str = "gradient",
    seen: Callable[[], object] = lambda: None,
) -> Prices:
    """Price all quantized tensors of a network.

    Args:
        model: with quantizers; it is not changed.
        batches: in any form that the objective takes.
        objective: what quantization is to preserve.
        widths: bit-widths, 2 to 16.
        kind: gradient, noise or measured: see the docstring of this module.
        seen: called after each batch.

    Raises:
        ValueError: the kind is unknown, there is no batch, or a price is NaN or infinite.
    """
    if kind not in PRICES:
        raise ValueError(f"price={kind!r}: must be one of {', '.join(PRICES)}")
    tensors = {t.quantizer: t.name for t in quantized_tensors(model)}
    pricing = _PRICING[kind](model, objective, tuple(widths))
    found: list[_OfBatch] = []
    with evaluating(model), quantizers_disabled(model):
        for batch in batches:
            found.append(pricing.price(batch))
            seen()
    if not found:
        raise ValueError("there is no batch to price tensors on")
    reached = {q: name for q, name in tensors.items() if any(q in each.prices for each in found)}
    nothing = torch.zeros(len(widths), dtype=torch.float64)  # the prices on a batch that does not reach the tensor
    return Prices(
        kind,
        tuple(widths),
        {name: torch.stack([each.prices.get(q, nothing).cpu() for each in found]) for q, name in reached.items()},
        {
            name: torch.stack([each.noise[q].cpu() for each in found if q in each.noise]).mean(0)
            for q, name in reached.items()
        },
    )


_Found = dict[Quantizer, Tensor]
"""Quantizer -> float64 [widths]."""


@dataclass
class _OfBatch:
    prices: _Found
    noise: _Found


def quantized(quantizer: Quantizer, x: Tensor, bits: int) -> Tensor:
    """Return Q(x) at some bit-width, with the scalars that the quantizer's method finds; shape and dtype of x."""
    format = replace(quantizer.format, bits=bits)
    return quantizer.quantized(x, quantizer.scalars_of(x, check=False, format=format), format)


@contextmanager
def quantized_to(model: nn.Module, bits: Mapping[str, int]) -> Iterator[None]:
    """Context manager under which the named tensors are quantized to the given bit-widths, and no others are."""
    named = {t.quantizer: bits[t.name] for t in quantized_tensors(model) if t.name in bits}

    def quantize(quantizer: Quantizer, x: Tensor) -> Tensor | None:
        return quantized(quantizer, x, named[quantizer])

    with evaluating(model), quantizers_disabled(model), _watched(named, quantize):
        yield


@contextmanager
def _watched(quantizers: Iterable[Quantizer], hook: Callable[[Quantizer, Tensor], Tensor | None]) -> Iterator[None]:
    """Context manager under which a hook gets each quantizer and its input; its result, if any, replaces the output."""

    def on_call(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        assert isinstance(quantizer, Quantizer)
        return hook(quantizer, args[0])

    handles = [q.register_forward_hook(on_call) for q in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Pricing(ABC):
    """A way to price the tensors of a network, which is in eval mode with its quantizers switched off."""

    def __init__(self, model: nn.Module, objective: Objective, widths: tuple[int, ...]) -> None:
        self.model, self.objective, self.widths = model, objective, widths
        self.tensors = quantized_tensors(model)
        self.quantizers = [t.quantizer for t in self.tensors]

    @abstractmethod
    def price(self, batch: Any) -> _OfBatch:
        """Return the prices and the noise of all tensors that a batch reaches."""


class _Noise(_Pricing):
    @torch.no_grad()
    def price(self, batch: Any) -> _OfBatch:
        noise: _Found = {}
        power: _Found = {}

        def look(quantizer: Quantizer, x: Tensor) -> None:
            errors = [_squares(quantized(quantizer, x, bits) - x) for bits in self.widths]
            _add(noise, quantizer, torch.stack(errors))
            _add(power, quantizer, _squares(x))

        with _watched(self.quantizers, look):
            self.objective.logits(self.model, batch)
        ratios = _ratios(noise, power)
        return _OfBatch(ratios, ratios)


class _Gradient(_Pricing):
    """Prices by gradients.

    A weight has the same error in all calls of its layer, so that error is multiplied by the sum of their gradients. An
    input has a separate error in each call.
    """

    def price(self, batch: Any) -> _OfBatch:
        noise: _Found = {}
        power: _Found = {}
        prices: _Found = {}
        weights = {t.quantizer for t in self.tensors if t.tensor == "weight"}
        calls: Counter[Quantizer] = Counter()
        repeated: dict[Quantizer, tuple[Tensor, Tensor]] = {}
        """weights of layers that are called several times, and the sum of their gradients over the calls"""
        asked = torch.zeros((), requires_grad=True)

        def add(quantizer: Quantizer, x: Tensor, grad: Tensor) -> None:
            found: list[tuple[Tensor, Tensor]] = []
            for bits in self.widths:
                e = quantized(quantizer, x, bits) - x
                found.append((_squares(e), _squares(e.mul_(grad))))
            errors, weighed = (torch.stack(row) for row in zip(*found, strict=True))
            _add(noise, quantizer, errors)
            _add(power, quantizer, _squares(x))
            _add(prices, quantizer, weighed)

        def with_gradient(quantizer: Quantizer, x: Tensor) -> Tensor:
            calls[quantizer] += 1

            def look(grad: Tensor) -> None:  # runs in the backward pass, when all calls are known
                if calls[quantizer] == 1 or quantizer not in weights:
                    add(quantizer, x, grad)
                else:
                    repeated[quantizer] = x, repeated[quantizer][1] + grad if quantizer in repeated else grad

            quantizer.hold(True)  # for the backward pass, save x itself
            out: Tensor = _Differentiated.apply(x, asked, look)
            return out

        with torch.enable_grad(), _watched(self.quantizers, with_gradient):
            loss, predictions = self.objective.loss(self.objective.logits(self.model, batch), batch)
        if loss.requires_grad:  # otherwise no tensor gets a gradient
            torch.autograd.grad(loss, asked, allow_unused=True)
        with torch.no_grad():
            for quantizer, (x, grad) in repeated.items():
                add(quantizer, x, grad)
        for quantizer in self.quantizers:
            quantizer.hold(False)
        return _OfBatch({q: predictions / 2 * total for q, total in prices.items()}, _ratios(noise, power))


class _Measured(_Pricing):
    @torch.no_grad()
    def price(self, batch: Any) -> _OfBatch:
        noise = _Noise(self.model, self.objective, self.widths).price(batch).noise
        plain = self.objective.logits(self.model, batch)
        prices = {
            t.quantizer: torch.stack([self._rise(t.name, bits, batch, plain) for bits in self.widths])
            for t in self.tensors
            if t.quantizer in noise
        }
        return _OfBatch(prices, noise)

    def _rise(self, tensor: str, bits: int, batch: Any, plain: Any) -> Tensor:
        with quantized_to(self.model, {tensor: bits}):
            return self.objective.rise(self.objective.logits(self.model, batch), plain, batch).double()


_PRICING: dict[str, type[_Pricing]] = {"gradient": _Gradient, "noise": _Noise, "measured": _Measured}


def _add(sums: _Found, quantizer: Quantizer, value: Tensor) -> None:
    """Add a value to the sum over all calls of a quantizer."""
    sums[quantizer] = sums[quantizer] + value if quantizer in sums else value


def _ratios(noise: _Found, power: _Found) -> _Found:
    """Return noise / power; 0 where the power is 0."""
    return {q: torch.where(power[q] > 0, noise[q] / power[q], 0.0) for q in noise}


def _squares(x: Tensor) -> Tensor:
    """Return the sum of squares, float64 []; a float32 tensor is not copied, whatever its memory layout."""
    norm: Tensor = torch.linalg.vector_norm(x.float())
    return norm.double().square()


class _Differentiated(torch.autograd.Function):
    """Returns x unchanged, and passes its gradient to a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, asked: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        ctx.look = look
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.look(grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None
