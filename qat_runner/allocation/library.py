"""Bits for a network of one's own: `qat.allocate`."""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qat_runner.allocation.costs import COSTS, Latencies
from qat_runner.allocation.costs import latency_ms as of_latencies
from qat_runner.allocation.objectives import of_distributions, of_loss
from qat_runner.allocation.operations import network, rules_of
from qat_runner.allocation.prices import price
from qat_runner.allocation.solving import Limit, allocate_bits
from qat_runner.insertion.insert import insert
from qat_runner.policy import Policy, Rule
from qat_runner.quant import BITS, Octav

WIDTHS = tuple(range(2, 9))
"""Bits that are chosen from."""


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
    """Choose the bits of every weight and activation so that the loss suffers least, within limits.

    Each tensor is priced at each width on a few batches (`allocation.prices`); the widths of least total price that
    keep all limits are found exactly (`allocation.solving`).

    Args:
        model: trained, in full precision, without quantizers; left as it is.
        batches: each an input tensor, or a tuple of arguments of forward; with a loss a pair of that and the targets. A
            dozen of 32 samples do. The first one has to come by all that bits are chosen for.
        budget: mean bits, at most, of weights and of activations, over the elements of those that have a choice.
        size_mb: megabytes (10^6 bytes) of the stored network, at most.
        bitops: 10^9 bit operations for one sample, at most: multiply-accumulates times the bits of both factors.
        traffic_mb: megabytes of operands that are read for one sample, at most.
        latency_ms: milliseconds, at most, by `latencies`.
        latencies: layer -> bits of its operands, such as (4, 8) for weight and input -> milliseconds; of one in full
            precision (32, 32).
        loss: what the network gives, targets -> mean loss, []. None: the network gives logits [N, C, ...] of classes,
            and what counts is that their distributions stay; no labels are needed.
        kind: how tensors are priced: gradient, noise or measured.
        widths: bits, 2 to 16, that are chosen from.
        same: both operands of an operation are to have the same bits.
        policy: what tensors get besides; bits that one of its rules says of some tensors stay. None: `Policy.of()`.

    Returns:
        The policy with a rule for each tensor, for `quantize_model(model, policy, example=...)`.

    Raises:
        ValueError: no limit, or one that the narrowest widths do not keep; no batch; widths out of range; nothing to
            choose bits for; a weight that several layers share, or a tensor that the first batch or all gradients pass
            by, without a rule.
    """
    limits = {"mean_bits": budget, "size_mb": size_mb, "bitops": bitops, "traffic_mb": traffic_mb}
    if latency_ms is None and all(most is None for most in limits.values()):
        raise ValueError("allocate: needs a limit: budget, size_mb, bitops, traffic_mb or latency_ms")
    first, rest = _first_of(batches)
    inputs = _arguments(first if loss is None else first[0])
    if not {*widths} <= {*BITS}:
        raise ValueError(f"widths={list(widths)}: must be {BITS.start} to {BITS.stop - 1}")
    if len({*widths}) < 2:
        raise ValueError(f"widths={list(widths)}: must be two or more, from which bits are chosen")
    policy = policy or Policy.of()
    quantized = insert(copy.deepcopy(model), pricing_policy(policy), inputs)
    known = network(quantized, widths, len(inputs[0]))
    kept = [Limit(measure, most) for name, most in limits.items() if most is not None for measure in COSTS[name](known)]
    if latency_ms is not None:
        kept += [Limit(measure, latency_ms) for measure in of_latencies(known, latencies or {}, same)]

    objective = of_distributions(lambda network, batch: network(*_arguments(batch)))
    if loss is not None:
        objective = of_loss(
            lambda network, batch: network(*_arguments(batch[0])),
            lambda out, batch: (loss(out, batch[1]), batch[1].numel()),
        )
    prices = price(quantized, rest, objective, known.widths, kind)
    best = allocate_bits(known, prices.mean(), kept, same)
    return Policy((*policy.rules, *map(Rule.from_dict, rules_of(known, best.bits))))


def pricing_policy(policy: Policy) -> Policy:
    """What tensors are priced under: the same, but learned scalars, which are not there yet, are OCTAV's."""
    rules = [replace(r, clipping=Octav()) if r.clipping is not None and r.clipping.learned else r for r in policy.rules]
    return Policy(tuple(rules))


def _first_of(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first, and all."""
    found = iter(batches)
    try:
        first = next(found)
    except StopIteration:
        raise ValueError("allocate: no batch to price tensors on") from None
    return first, itertools.chain([first], found)


def _arguments(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
