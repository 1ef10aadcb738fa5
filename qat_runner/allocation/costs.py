"""What bits cost: the mean of them, memory, bit operations, traffic, or measured latency.

Each is a sum over the operations of a network of what the widths of their operands cost, so that the cheapest choice
of widths is a linear problem.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qat_runner.allocation.operations import Network, Operation
from qat_runner.policy import FULL_PRECISION

Widths = tuple[int, ...]
"""Bits of the operands of an operation."""
Latencies = Mapping[str, Mapping[Widths, float]]
"""Layer -> widths of its operands -> milliseconds."""


@dataclass(frozen=True)
class Measure:
    """One figure of a network, such as the mean bits of its weights."""

    name: str
    of: Callable[[Operation, Widths], float]
    """what an operation adds to it"""
    rest: float = 0.0
    """what all else adds"""

    def total(self, network: Network, bits: Mapping[str, int]) -> float:
        """Of the whole network, with so many bits for each tensor."""
        return self.rest + sum(self.of(op, tuple(bits[o.name] for o in op.operands)) for op in network.operations)

    def table(self, network: Network, choices: Sequence[Sequence[Widths]]) -> list[np.ndarray]:
        """For each operation, what each choice adds, float64 [choices]."""
        return [np.array([self.of(op, w) for w in some]) for op, some in zip(network.operations, choices, strict=True)]


def mean_bits(network: Network) -> list[Measure]:
    """Mean bits of weights, and of activations, over the elements of the tensors that have a choice.

    A limit of 4 is kept by both: so a network with 4 bits everywhere is a choice under it.
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
        return sum(o.elements * bits for o, bits in pairs if o.free and o.weight == weights) / total

    return of


def size_mb(network: Network) -> list[Measure]:
    """Megabytes (10^6 bytes) of the stored network: see `insertion.size`."""
    return [Measure("MB", _stored, network.rest_mb)]


def _stored(operation: Operation, widths: Widths) -> float:
    return sum(o.elements * bits for o, bits in zip(operation.operands, widths, strict=True) if o.stored) / 8e6


def bitops(network: Network) -> list[Measure]:
    """Giga bit operations for one sample: multiply-accumulates times the bits of both factors."""
    return [Measure("GBitOPs", _bitops, network.rest_macs * FULL_PRECISION**2 / 1e9)]


def _bitops(operation: Operation, widths: Widths) -> float:
    both = widths if len(widths) == 2 else (*widths, FULL_PRECISION)
    return operation.macs * both[0] * both[1] / 1e9


def traffic_mb(network: Network) -> list[Measure]:
    """Megabytes (10^6 bytes) of operands that layers and products of attention multiply for one sample, each once."""
    return [Measure("MB read", _read, sum(_read(op, _full_precision(op)) for op in network.left))]


def _full_precision(operation: Operation) -> Widths:
    return (FULL_PRECISION,) * len(operation.operands)


def _read(operation: Operation, widths: Widths) -> float:
    if not operation.multiplies:
        return 0.0
    return sum(o.elements * bits for o, bits in zip(operation.operands, widths, strict=True)) / 8e6


def latency_ms(network: Network, latencies: Latencies, same: bool = False) -> list[Measure]:
    """Milliseconds of all layers and products of attention that inference multiplies by, as measured.

    Args:
        network: see `operations.network`.
        latencies: of each of these, at all widths that it may have; in full precision at 32 bits.
        same: whether both operands of an operation are to have the same bits, where both have a choice.

    Raises:
        ValueError: an operation or widths that the table lacks.
    """
    for op in (*network.operations, *network.left):
        if not op.multiplies:
            continue
        if op.layer not in latencies:
            raise ValueError(f"latencies: has nothing of {op.layer}")
        for widths in op.choices(same):
            if widths not in latencies[op.layer]:
                raise ValueError(f"latencies: {op.layer} lacks {'x'.join(map(str, widths))} bits")

    def taken(operation: Operation, widths: Widths) -> float:
        return latencies[operation.layer][widths] if operation.multiplies else 0.0

    return [Measure("ms", taken, sum(taken(op, _full_precision(op)) for op in network.left))]


COSTS: dict[str, Callable[[Network], list[Measure]]] = {
    "mean_bits": mean_bits,
    "size_mb": size_mb,
    "bitops": bitops,
    "traffic_mb": traffic_mb,
}
"""By the name of what limits them."""
