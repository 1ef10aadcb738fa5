"""Bit allocation: price each tensor at each bit-width by its effect on the loss; choose exactly, within a budget."""

from qat_runner.allocation.costs import COSTS, Measure, latency_ms
from qat_runner.allocation.library import allocate, pricing_policy
from qat_runner.allocation.objectives import Objective, distribution_objective, divergence, loss_objective
from qat_runner.allocation.operations import Network, Operand, Operation, network, rules_of
from qat_runner.allocation.prices import Prices, price
from qat_runner.allocation.solving import Allocation, InfeasibleError, Limit, allocate_bits, front, uniform

__all__ = [
    "COSTS",
    "Allocation",
    "InfeasibleError",
    "Limit",
    "Measure",
    "Network",
    "Objective",
    "Operand",
    "Operation",
    "Prices",
    "allocate",
    "allocate_bits",
    "distribution_objective",
    "divergence",
    "front",
    "latency_ms",
    "loss_objective",
    "network",
    "price",
    "pricing_policy",
    "rules_of",
    "uniform",
]
