"""The weights of a network, quantized together: in a handful of operations a step, however many they are.

What is done to a small tensor costs less than the call that does it. All weights are there before a step begins: those
that are quantized alike are solved, remembered and rounded at once, and so are their gradients in the end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.estimators import solve_and_quantize_all
from qat_runner.quant.quantizer import Given, Plan, Quantizer
from qat_runner.quant.tensors import written

LARGEST = 1 << 22
"""Elements of a weight, at most: of a larger one the call does not matter, but memory does, as all are held at once."""


class _Weight(NamedTuple):
    quantizer: Quantizer
    x: Tensor
    plan: Plan


class WeightsTogether:
    """Quantizers of weights, for steps of training.

    Those that solve anew on each call, and have scalars to start from, do so together; the others as ever.

    Args:
        weights: each quantizer, and the parameter that it is given; None: it is given something else at each call, that
            the batch may decide.
        bucket: bytes of weights whose gradients wait for one another; None: all do. For gradients that are sent to
            other processes while the backward pass goes on.
    """

    def __init__(self, weights: Sequence[tuple[Quantizer, Tensor | None]], bucket: int | None = None) -> None:
        self._weights, self._bucket = weights, bucket
        self._plans: list[Plan | None] = []
        self._groups: list[list[_Weight]] = []

    @contextmanager
    def quantized(self, passes: int = 1) -> Iterator[None]:
        """While open, the first call of each quantizer finds its weight quantized: for a forward and backward pass.

        Args:
            passes: how many of these there are, one after another. With several, all calls that are given a parameter
                find the same, and the sum of the gradients passes through the quantization on leaving, once.
        """
        quantizers = [q for q, _ in self._weights]
        with Quantizer.reusing([q for q, x in self._weights if x is not None]) if passes > 1 else nullcontext():
            try:
                for group in self._grouped():
                    _quantize(group)
                yield
            finally:
                for q in quantizers:
                    q.take_back()

    def _grouped(self) -> list[list[_Weight]]:
        """Those that are quantized together. They are found anew only if one is to be quantized otherwise."""
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
    """Whether a weight takes part. Hooks of one that no gradient comes to would be called all the same."""
    return x.numel() <= LARGEST and not (x._backward_hooks or x._post_accumulate_grad_hooks)


def _quantize(weights: list[_Weight]) -> None:
    """Solve for scalars, remember them, quantize; the quantizers are given what came out."""
    first, plan = weights[0].quantizer, weights[0].plan
    backend = kernels.backend(weights[0].x)
    states, searches = [weight.quantizer.remembered() for weight in weights], [weight.plan.search for weight in weights]

    def solve(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return backend.octav_and_quantize_all(xs, plan.cost, plan.format, searches, states, first.method.warm)

    ss, outs = solve_and_quantize_all([weight.x for weight in weights], solve, plan.format, first.gradient)
    for weight, s, out in zip(weights, ss, outs, strict=True):
        weight.quantizer.give(Given(weight.x, written(weight.x), s, out, held=backend.CALLS_COST))
