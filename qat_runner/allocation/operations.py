"""What bits are allocated to: the operations of a network, their operands, and the candidate bit-widths of each.

A tensor *has a choice* if it has more than one candidate, that is, if bit allocation chooses its bit-width.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """names of layer and tensor, such as conv1.weight"""
    weight: bool
    elements: int
    """number of elements; of an activation, for one sample"""
    widths: tuple[int, ...]
    """candidate bit-widths; a single one if the bit-width is fixed, as by a rule of the policy"""
    shared: bool = False
    """whether it is a weight whose storage other layers share"""

    @property
    def has_choice(self) -> bool:
        """Whether more than one bit-width is allowed for it."""
        return len(self.widths) > 1

    @property
    def stored(self) -> bool:
        """Whether it is a weight that is stored for this operation alone."""
        return self.weight and not self.shared


@dataclass(frozen=True)
class Operation:
    """A layer or a matrix multiplication in attention, and its operands."""

    layer: str
    operands: tuple[Operand, ...]
    macs: float
    """multiply-accumulates for one sample"""
    embedding: bool = False
    """whether it is a lookup, which multiplies nothing"""
    training: bool = False
    """whether it is used only in training, like an auxiliary head"""

    @property
    def multiplies(self) -> bool:
        """Whether inference multiplies its operands."""
        return not (self.embedding or self.training)

    def choices(self, same: bool = False) -> list[tuple[int, ...]]:
        """Return all combinations of bit-widths that its operands may have.

        Args:
            same: whether all operands that have a choice must have the same bit-width.
        """
        free = [operand.has_choice for operand in self.operands]
        return [
            widths
            for widths in itertools.product(*(operand.widths for operand in self.operands))
            if not same or len({w for w, chosen in zip(widths, free, strict=True) if chosen}) <= 1
        ]


@dataclass(frozen=True)
class Network:
    """What bit allocation needs to know about a network."""

    operations: tuple[Operation, ...]
    rest_mb: float
    """megabytes of all but weights of a single operation: biases, normalization, clipping scalars, shared weights"""
    rest_macs: float
    """multiply-accumulates for one sample of everything that is not quantized"""
    unquantized: tuple[Operation, ...] = ()
    """operations that are not quantized, as far as they are layers or matrix multiplications in attention"""

    def by_tensor(self) -> "Network":
        """Return the network with an operation of its own for each operand."""
        apart = (replace(op, operands=(operand,)) for op in self.operations for operand in op.operands)
        return replace(self, operations=tuple(apart))

    @property
    def free(self) -> list[Operand]:
        """The tensors that have a choice."""
        return [operand for operation in self.operations for operand in operation.operands if operand.has_choice]

    @property
    def widths(self) -> list[int]:
        """The bit-widths at which tensors are priced: all candidates, and those that rules set."""
        found = {width for operation in self.operations for operand in operation.operands for width in operand.widths}
        return sorted(found - {FULL_PRECISION})


def network(model: nn.Module, widths: Sequence[int], samples: int) -> Network:
    """Return the operations of a quantized network.

    Args:
        model: quantized by a policy, and traced on an example.
        widths: candidate bit-widths, for tensors whose bit-width no rule of the policy sets. Layers that are used only
            in training, such as an auxiliary head, keep the bit-widths of the policy.
        samples: the number of samples in that example.

    Raises:
        ValueError: no tensor has a choice; or a tensor that has one is shared by several layers, or was not reached by
            the example, so that its costs are not known.
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
            unseen += [operand.name for operand in of if operand.has_choice]
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
    """Raise a ValueError if no tensor has a choice, or if the costs of one that has a choice are not known."""
    free = [operand for operation in operations for operand in operation.operands if operand.has_choice]
    if tied := [operand.name for operand in free if operand.shared]:
        raise ValueError(f"{', '.join(tied)}: shared with other layers, so rules must set the bit-width")
    if unseen:
        raise ValueError(f"{', '.join(unseen)}: not reached by the example, so rules must set the bit-width")
    if not free:
        ends = ", or first_last_bits (8 by default) for the first and the last layer," if len(operations) <= 2 else ""
        raise ValueError(f"rules{ends} set the bit-widths of all tensors, so there is nothing to choose")


def _in_full_precision(layer: nn.Module | None, name: str, inputs: Mapping[str, int], macs: float) -> Operation:
    """Return the operation of a layer, or of a matrix multiplication in attention, that is not quantized.

    The latter's module may have been removed (None).
    """
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
    """Return rules of a policy, as plain values, that set the bit-widths of tensors by name.

    Args:
        network: the network of these tensors.
        bits: name of a tensor -> bit-width.
        all: whether to include tensors that have no choice.
    """
    return [
        {"match": exactly(operand.name), **({"type": EMBEDDING} if op.embedding else {}), "bits": bits[operand.name]}
        for op in network.operations
        for operand in op.operands
        if all or operand.has_choice
    ]


def said_by_rule(policy: Policy, layer: str, kind: str, operand: str) -> bool:
    """Whether a rule sets the bit-width of a tensor.

    The rules that a policy begins with, for all tensors and for all weights, do not count.
    """
    return any(
        rule.bits is not None and rule.matches(layer, kind, operand)
        for number, rule in enumerate(policy.rules)
        if not (number == 0 and rule.everything) and not (number == 1 and (rule.match, rule.type) == ("*.weight", "*"))
    )
