"""Bit allocation for your own network: `qat.allocate`."""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qat_runner.allocation.costs import COSTS, Latencies
from qat_runner.allocation.costs import latency_ms as of_latencies
from qat_runner.allocation.objectives import distribution_objective, loss_objective
from qat_runner.allocation.operations import network, rules_of
from qat_runner.allocation.prices import price
from qat_runner.allocation.solving import Limit, allocate_bits
from qat_runner.insertion.copying import not_called
from qat_runner.insertion.insert import insert
from qat_runner.insertion.modes import call, inputs_of_batch
from qat_runner.insertion.tensors import samples_in
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.policy import Policy, Rule
from qat_runner.quant import BITS, Octav

WIDTHS = tuple(range(2, 9))
"""The default candidate bit-widths."""


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float | None = None,
    *,
    size_mb: float | None = None,
    bitops: float | None = None,
    traffic_mb: float | None = None,
    latency_ms: float | None = None,
    latencies: Latencies | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    kind: str = "gradient",
    widths: Sequence[int] = WIDTHS,
    same: bool = False,
    policy: Policy | None = None,
) -> Policy:
    """Choose the bit-width of every weight and activation so that the loss suffers least, within limits.

    Each tensor gets a price (estimated sensitivity) at each bit-width, measured on a few batches (`allocation.prices`).
    The bit-widths with the least total price within all limits are found exactly (`allocation.solving`).

    Args:
        model: trained, in full precision, without quantizers, or a wrapper around it, as in `quantize_model`; it is not
            changed.
        batches: each an input tensor, a tuple or list of arguments of forward, or a mapping of their names to
            arguments; with a loss, a pair of that and the targets. A dozen batches of 32 samples are enough. The first
            batch must reach every tensor that has a choice.
        budget: upper limit on the average bit-width of weights, and of activations, over the elements of the tensors
            that have a choice.
        size_mb: upper limit on the megabytes (10^6 bytes) of the stored network.
        bitops: upper limit on the bit operations for one sample, in units of 10^9: multiply-accumulates times the
            bit-widths of both factors.
        traffic_mb: upper limit on the megabytes of operands that are read for one sample.
        latency_ms: upper limit on the milliseconds, according to `latencies`.
        latencies: layer -> bit-widths of its operands, such as (4, 8) for weight and input -> milliseconds; (32, 32)
            for a layer in full precision.
        loss: called with the output of the network and the targets; returns the mean loss, []. None: the network
            returns logits [N, C, ...] of classes, alone or as `logits`, as networks of transformers do, and its
            distributions are to be preserved; no labels are needed.
        kind: how tensors are priced: gradient, noise or measured.
        widths: candidate bit-widths, 2 to 16.
        same: whether both operands of an operation must have the same bit-width.
        policy: everything else about the quantizers. Bit-widths that its rules set are kept, except those that a policy
            begins with: for all tensors, and for all weights. None: `Policy.of()`.

    Returns:
        The policy with a further rule for each tensor that has a choice, for
        `quantize_model(model, policy, example=...)`.

    Raises:
        ValueError: there is no limit, or no bit-widths satisfy the limits; there is no batch; there are fewer than two
            candidate bit-widths, or some out of range; no tensor has a choice; a tensor without a rule is a weight
            that several layers share, is not reached by the first batch, or gets no gradient; a forward that was set on
            an instance would run the original in a copy; or there is no loss, and the network returns no logits.
    """
    limits = {"mean_bits": budget, "size_mb": size_mb, "bitops": bitops, "traffic_mb": traffic_mb}
    if latency_ms is None and all(most is None for most in limits.values()):
        raise ValueError("allocate: needs a limit: budget, size_mb, bitops, traffic_mb or latency_ms")
    first, rest = _first_of(batches)
    model = unwrapped(model)
    inputs = inputs_of_batch(model, first if loss is None else first[0])
    if not {*widths} <= {*BITS}:
        raise ValueError(f"widths={list(widths)}: must be {BITS.start} to {BITS.stop - 1}")
    if len({*widths}) < 2:
        raise ValueError(f"widths={list(widths)}: must be two or more bit-widths to choose from")
    policy = policy or Policy.of()
    quantized = copy.deepcopy(model)
    with not_called(model, by=quantized):
        insert(quantized, pricing_policy(policy), inputs)
    known = network(quantized, widths, samples_in(inputs))
    kept = [Limit(measure, most) for name, most in limits.items() if most is not None for measure in COSTS[name](known)]
    if latency_ms is not None:
        kept += [Limit(measure, latency_ms) for measure in of_latencies(known, latencies or {}, same)]

    objective = distribution_objective(lambda network, batch: _logits(call(network, inputs_of_batch(network, batch))))
    if loss is not None:
        objective = loss_objective(
            lambda network, batch: call(network, inputs_of_batch(network, batch[0])),
            lambda out, batch: (loss(out, batch[1]), batch[1].numel()),
        )
    prices = price(quantized, rest, objective, known.widths, kind)
    best = allocate_bits(known, prices.mean(), kept, same)
    return Policy((*policy.rules, *map(Rule.from_dict, rules_of(known, best.bits))))


def pricing_policy(policy: Policy) -> Policy:
    """Return the policy for pricing: OCTAV replaces learned methods, which have no clipping scalars yet."""
    rules = [replace(r, clipping=Octav()) if r.clipping is not None and r.clipping.learned else r for r in policy.rules]
    return Policy(tuple(rules))


def _first_of(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, and all batches."""
    found = iter(batches)
    try:
        first = next(found)
    except StopIteration:
        raise ValueError("allocate: there is no batch to price tensors on") from None
    return first, itertools.chain([first], found)


def _logits(out: Any) -> Tensor:
    """Return the logits in the output of a network.

    Raises:
        ValueError: there are none.
    """
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
    if not isinstance(found, Tensor):
        raise ValueError(f"allocate: the network returns {type(out).__name__}, not logits: pass a loss that takes it")
    return found
