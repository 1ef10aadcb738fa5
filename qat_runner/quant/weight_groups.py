"""Quantizes the weights of a network together, in a handful of operations per step, however many weights there are.

For a small tensor, the overhead of a call exceeds the cost of the computation. All weights are available before a step
begins, so those that are quantized in the same way are solved, remembered and rounded in one operation. The same holds
for their gradients at the end of the backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.estimators import solve_and_quantize_all
from qat_runner.quant.quantizer import Plan, PrecomputedResult, Quantizer
from qat_runner.quant.tensors import version_key

LARGEST = 1 << 22
"""Maximum number of elements of a weight. For a larger one, the overhead of a call does not matter, but the memory
does, as all quantized weights are held at the same time."""


class _Weight(NamedTuple):
    quantizer: Quantizer
    x: Tensor
    plan: Plan


class WeightsTogether:
    """Quantizers of weights, for training steps.

    Dynamic quantizers that have scalars to start from are solved together; all others work as usual.

    Args:
        weights: each quantizer with the parameter that it quantizes, or None if it quantizes another tensor at each
            call, which may depend on the batch.
        bucket: maximum size, in bytes, of a group of weights whose gradients wait for each other; None for no limit. A
            limit is useful if gradients are sent to other processes while the backward pass is still running.
    """

    def __init__(self, weights: Sequence[tuple[Quantizer, Tensor | None]], bucket: int | None = None) -> None:
        self._weights, self._bucket = weights, bucket
        self._plans: list[Plan | None] = []
        self._groups: list[list[_Weight]] = []

    @contextmanager
    def quantized(self, passes: int = 1) -> Iterator[None]:
        """Return a context in which the first call of each quantizer finds its weight already quantized.

        Use it around a forward and backward pass.

        Args:
            passes: number of forward and backward passes in the context. With more than one, all calls for a parameter
                get the same result, and on leaving the context the sum of the gradients passes through the quantization
                once.
        """
        quantizers = [q for q, _ in self._weights]
        with Quantizer.reusing([q for q, x in self._weights if x is not None]) if passes > 1 else nullcontext():
            try:
                for group in self._grouped():
                    _quantize(group)
                yield
            finally:
                for q in quantizers:
                    q.discard_result()

    def _grouped(self) -> list[list[_Weight]]:
        """Return the groups of weights that are quantized together; regroup only if the plan of a weight changed."""
        plans = [q.planned(x) if x is not None and _joins(x) else None for q, x in self._weights]
        if not (len(plans) == len(self._plans) and all(a is b for a, b in zip(plans, self._plans, strict=True))):
            self._plans = plans
            alike: dict[Any, list[_Weight]] = {}
            for (q, x), plan in zip(self._weights, plans, strict=True):
                if x is not None and plan is not None and plan.seen:
                    how = plan.search.iterations, plan.search.tolerance, q.method.warm, q.momentum, q.gradient
                    alike.setdefault((plan.cost, plan.format, *how, x.dtype, x.device), []).append(_Weight(q, x, plan))
            self._groups = [bucket for group in alike.values() for bucket in self._buckets(group)]
        return self._groups

    def _buckets(self, group: list[_Weight]) -> Iterator[list[_Weight]]:
        bucket: list[_Weight] = []
        size = 0
        for weight in group:
            if bucket and self._bucket is not None and size + weight.x.nbytes > self._bucket:
                yield bucket
                bucket, size = [], 0
            bucket.append(weight)
            size += weight.x.nbytes
        yield bucket


def _joins(x: Tensor) -> bool:
    """Whether a weight takes part. One with hooks does not: they would be called even if no gradient reaches it."""
    return x.numel() <= LARGEST and not (x._backward_hooks or x._post_accumulate_grad_hooks)


def _quantize(weights: list[_Weight]) -> None:
    """Solve for the scalars of all weights, remember them, quantize, and give the results to the quantizers."""
    first, plan = weights[0].quantizer, weights[0].plan
    backend = kernels.backend(weights[0].x)
    states, searches = [weight.quantizer.remembered() for weight in weights], [weight.plan.search for weight in weights]

    def solve(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return backend.octav_and_quantize_all(xs, plan.cost, plan.format, searches, states, first.method.warm)

    ss, outs = solve_and_quantize_all([weight.x for weight in weights], solve, plan.format, first.gradient)
    for weight, s, out in zip(weights, ss, outs, strict=True):
        weight.quantizer.set_result(PrecomputedResult(weight.x, version_key(weight.x), s, out, held=backend.CALLS_COST))
