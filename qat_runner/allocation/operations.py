"""What bits are chosen for: the operations of a network, the tensors that each multiplies, and the widths allowed."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat_runner.insertion.insert import left_of, policy_of, products_of, quantized_tensors
from qat_runner.insertion.layers import (
    each,
    elements_of,
    is_quantized,
    kind_of,
    modules_by_name,
    narrow_kind,
    operands,
    quantizer_of,
    was_seen,
)
from qat_runner.insertion.size import shared_weights, size_mb
from qat_runner.policy import EMBEDDING, FULL_PRECISION, Policy, exactly
from qat_runner.quant import Quantizer


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation multiplies."""

    name: str
    """of layer and tensor, such as conv1.weight"""
    weight: bool
    elements: int
    """of an activation for one sample"""
    widths: tuple[int, ...]
    """bits that it may have; one, if a rule of the policy says it"""
    shared: bool = False
    """whether it is a weight that is stored for other layers as well"""

    @property
    def free(self) -> bool:
        """Whether there is a choice."""
        return len(self.widths) > 1

    @property
    def stored(self) -> bool:
        """Whether it is stored for this operation alone."""
        return self.weight and not self.shared


@dataclass(frozen=True)
class Operation:
    """A layer or a product of attention, and its operands."""

    layer: str
    operands: tuple[Operand, ...]
    macs: float
    """multiply-accumulates for one sample"""
    embedding: bool = False
    """whether it is none, but a lookup"""
    training: bool = False
    """whether it is at work in training alone, as an auxiliary head is"""

    @property
    def multiplies(self) -> bool:
        """Whether inference multiplies what it has."""
        return not (self.embedding or self.training)

    def choices(self, same: bool = False) -> list[tuple[int, ...]]:
        """All widths that its operands may have together.

        Args:
            same: operands that have a choice are to have the same.
        """
        free = [operand.free for operand in self.operands]
        return [
            widths
            for widths in itertools.product(*(operand.widths for operand in self.operands))
            if not same or len({w for w, chosen in zip(widths, free, strict=True) if chosen}) <= 1
        ]


@dataclass(frozen=True)
class Network:
    """What is known of a network when bits are chosen for it."""

    operations: tuple[Operation, ...]
    rest_mb: float
    """megabytes of all that is no weight of one operation: biases, normalization, clipping scalars, what is shared"""
    rest_macs: float
    """multiply-accumulates for one sample of all that is not quantized"""
    left: tuple[Operation, ...] = ()
    """operations that are not quantized, as far as they are layers or products of attention"""

    @property
    def free(self) -> list[Operand]:
        """The tensors that have a choice."""
        return [operand for operation in self.operations for operand in operation.operands if operand.free]

    @property
    def widths(self) -> list[int]:
        """All bits that tensors may have, or have by a rule: what they are priced at."""
        found = {width for operation in self.operations for operand in operation.operands for width in operand.widths}
        return sorted(found - {FULL_PRECISION})


def network(model: nn.Module, widths: Sequence[int], samples: int) -> Network:
    """The operations of a quantized network.

    Args:
        model: quantized by a policy, and seen at work on an example.
        widths: bits that are chosen from, where no rule of the policy says them. What works in training alone, such as
            an auxiliary head, has those of the policy.
        samples: of that example.

    Raises:
        ValueError: there is no tensor to choose bits for; or one is stored for several layers, or the example did not
            come by it, so that its costs are not known.
    """
    policy, shared, products = policy_of(model), shared_weights(model), products_of(model)
    macs: dict[str, float] = {}
    for product in products:
        if not product.training:
            macs[product.module] = macs.get(product.module, 0) + product.macs / samples
    training = {product.module for product in products} - macs.keys()
    found, unseen = [], []
    for name, layer in each(model, is_quantized):
        embedding, trained = kind_of(layer) == EMBEDDING, name in training
        of = tuple(_operands(name, layer, policy, () if trained else sorted({*widths}), shared))
        found.append(Operation(name, of, macs.get(name, 0.0), embedding, trained))
        if not (was_seen(layer) if embedding else name in macs):
            unseen += [operand.name for operand in of if operand.free]
    _check_choices(found, unseen)
    quantized, _ = size_mb(model)
    bits = {t.name: t.quantizer.format.bits for t in quantized_tensors(model)}
    stored = sum(bits.get(o.name, FULL_PRECISION) * o.elements for op in found for o in op.operands if o.stored)
    named = {operation.layer for operation in found}
    rest_macs = sum(of_layer for name, of_layer in macs.items() if name not in named)
    modules, inputs = modules_by_name(model), left_of(model)
    left = (_in_full_precision(modules.get(name), name, inputs[name], macs[name]) for name in inputs if name in macs)
    return Network(tuple(found), quantized - stored / 8e6, rest_macs, tuple(left))


def _check_choices(operations: Sequence[Operation], unseen: Sequence[str]) -> None:
    """Refuse a network without a choice, or with one among widths whose costs are not known."""
    free = [operand for operation in operations for operand in operation.operands if operand.free]
    if tied := [operand.name for operand in free if operand.shared]:
        raise ValueError(f"{', '.join(tied)}: stored for other layers as well: rules must say the bits")
    if unseen:
        raise ValueError(f"{', '.join(unseen)}: no sample of the example comes by there: rules must say the bits")
    if not free:
        ends = ", or first_last_bits (8 by default) of the first and the last layer," if len(operations) <= 2 else ""
        raise ValueError(f"rules{ends} say the bits of all tensors: there is none to choose them for")


def _in_full_precision(layer: nn.Module | None, name: str, inputs: Mapping[str, int], macs: float) -> Operation:
    """A layer, or a product of attention, whose module may be gone, that is not quantized."""
    elements = dict(inputs)
    if layer is not None and "weight" in operands(layer):
        elements = {"weight": elements_of(layer, "weight") or 0, **inputs}
    of = (Operand(f"{name}.{key}", key == "weight", count, (FULL_PRECISION,)) for key, count in elements.items())
    return Operation(name, tuple(of), macs)


def _operands(
    name: str, layer: nn.Module, policy: Policy, widths: Sequence[int], shared: set[str]
) -> Iterator[Operand]:
    for operand in operands(layer):
        quantizer = quantizer_of(layer, operand)
        allowed: tuple[int, ...] = (FULL_PRECISION,)
        if isinstance(quantizer, Quantizer):
            said = not widths or said_by_rule(policy, name, narrow_kind(layer), operand)
            allowed = (quantizer.format.bits,) if said else tuple(widths)
        tensor = f"{name}.{operand}"
        yield Operand(tensor, operand == "weight", elements_of(layer, operand) or 0, allowed, tensor in shared)


def rules_of(network: Network, bits: Mapping[str, int], all: bool = False) -> list[dict[str, Any]]:
    """Rules of a policy, in plain values, that give tensors so many bits, by name.

    Args:
        network: whose tensors.
        bits: name of a tensor -> bits.
        all: also those that have no choice.
    """
    return [
        {"match": exactly(operand.name), **({"type": EMBEDDING} if op.embedding else {}), "bits": bits[operand.name]}
        for op in network.operations
        for operand in op.operands
        if all or operand.free
    ]


def said_by_rule(policy: Policy, layer: str, kind: str, operand: str) -> bool:
    """Whether a rule says the bits of a tensor, beside those that a policy begins with: of all, and of all weights."""
    return any(
        rule.bits is not None and rule.matches(layer, kind, operand)
        for number, rule in enumerate(policy.rules)
        if not (number == 0 and rule.everything) and not (number == 1 and (rule.match, rule.type) == ("*.weight", "*"))
    )
