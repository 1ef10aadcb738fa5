"""What bit-widths cost: their average, memory, bit operations, traffic, or measured latency.

Each cost is a sum over the operations of a network, and what an operation adds depends only on the bit-widths of its
operands. Finding the cheapest choice of bit-widths is therefore a linear problem.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qat_runner.allocation.operations import Network, Operation
from qat_runner.policy import FULL_PRECISION

Widths = tuple[int, ...]
"""Bit-widths of the operands of an operation."""
Latencies = Mapping[str, Mapping[Widths, float]]
"""Layer -> bit-widths of its operands -> milliseconds."""


@dataclass(frozen=True)
class Measure:
    """One figure of a network, such as the average bit-width of its weights."""

    name: str
    of: Callable[[Operation, Widths], float]
    """what an operation adds to it, given the bit-widths of its operands"""
    rest: float = 0.0
    """what everything else adds to it"""
    by_tensor: bool = True
    """whether what an operation adds is a sum over its operands, so that their bit-widths can be chosen separately"""

    def total(self, network: Network, bits: Mapping[str, int]) -> float:
        """Return the figure of the whole network, given the bit-width of each tensor by name."""
        return self.rest + sum(self.of(op, tuple(bits[o.name] for o in op.operands)) for op in network.operations)

    def table(self, network: Network, choices: Sequence[Sequence[Widths]]) -> list[np.ndarray]:
        """Return, for each operation, what each choice of bit-widths adds, float64 [choices]."""
        return [np.array([self.of(op, w) for w in some]) for op, some in zip(network.operations, choices, strict=True)]


def mean_bits(network: Network) -> list[Measure]:
    """Return measures of the average bit-width of weights and of activations, over elements of tensors with a choice.

    A limit of 4 applies to each of the two, so a network with 4 bits everywhere satisfies it.
    """
    found = []
    for weights, name in ((True, "mean bits of weights"), (False, "mean bits of activations")):
        total = sum(operand.elements for operand in network.free if operand.weight == weights)
        if total:
            found.append(Measure(name, _mean_bits(weights, total)))
    return found


def _mean_bits(weights: bool, total: int) -> Callable[[Operation, Widths], float]:
    def of(operation: Operation, widths: Widths) -> float:
        pairs = zip(operation.operands, widths, strict=True)
        return sum(o.elements * bits for o, bits in pairs if o.has_choice and o.weight == weights) / total

    return of


def size_mb(network: Network) -> list[Measure]:
    """Return the measure of megabytes (10^6 bytes) of the stored network: see `insertion.size`."""
    return [Measure("MB", _stored, network.rest_mb)]


def _stored(operation: Operation, widths: Widths) -> float:
    return sum(o.elements * bits for o, bits in zip(operation.operands, widths, strict=True) if o.stored) / 8e6


def bitops(network: Network) -> list[Measure]:
    """Return the measure of giga bit operations for one sample: multiply-accumulates times both bit-widths."""
    return [Measure("GBitOPs", _bitops, network.rest_macs * FULL_PRECISION**2 / 1e9, by_tensor=False)]


def _bitops(operation: Operation, widths: Widths) -> float:
    both = widths if len(widths) == 2 else (*widths, FULL_PRECISION)
    return operation.macs * both[0] * both[1] / 1e9


def traffic_mb(network: Network) -> list[Measure]:
    """Return the measure of megabytes (10^6 bytes) of operands that are read for one sample.

    These are the operands of layers and of matrix multiplications in attention; each operand is read once.
    """
    return [Measure("MB read", _read, sum(_read(op, _full_precision(op)) for op in network.unquantized))]


def _full_precision(operation: Operation) -> Widths:
    return (FULL_PRECISION,) * len(operation.operands)


def _read(operation: Operation, widths: Widths) -> float:
    if not operation.multiplies:
        return 0.0
    return sum(o.elements * bits for o, bits in zip(operation.operands, widths, strict=True)) / 8e6


def latency_ms(network: Network, latencies: Latencies, same: bool = False) -> list[Measure]:
    """Return the measure of milliseconds of all layers and matrix multiplications in attention that inference runs.

    Args:
        network: see `operations.network`.
        latencies: the measured latency of each of them, at all bit-widths that its operands may have; at 32 bits if it
            is in full precision.
        same: whether both operands of an operation must have the same bit-width, if both have a choice.

    Raises:
        ValueError: the table lacks an operation, or some of its bit-widths.
    """
    for op in (*network.operations, *network.unquantized):
        if not op.multiplies:
            continue
        if op.layer not in latencies:
            raise ValueError(f"latencies: has no entry for {op.layer}")
        for widths in op.choices(same):
            if widths not in latencies[op.layer]:
                raise ValueError(f"latencies: {op.layer} lacks {'x'.join(map(str, widths))} bits")

    def taken(operation: Operation, widths: Widths) -> float:
        return latencies[operation.layer][widths] if operation.multiplies else 0.0

    rest = sum(taken(op, _full_precision(op)) for op in network.unquantized)
    return [Measure("ms", taken, rest, by_tensor=False)]


COSTS: dict[str, Callable[[Network], list[Measure]]] = {
    "mean_bits": mean_bits,
    "size_mb": size_mb,
    "bitops": bitops,
    "traffic_mb": traffic_mb,
}
"""Name of a cost -> function that returns its measures for a network."""
