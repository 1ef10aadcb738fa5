"""The quantizer module, which decides when a clipping method solves for scalars, and rounds x with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.estimators import fake_quantize, solve_and_quantize
from qat_runner.quant.formats import Format, IntFormat, as_format
from qat_runner.quant.gradients import Estimator, gradient_estimator
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.method import EVAL_MODES, Call, ClippingMethod
from qat_runner.quant.orienting import oriented
from qat_runner.quant.pool import Processes
from qat_runner.quant.shared_scalars import LatestScalars
from qat_runner.quant.state import ScalarState
from qat_runner.quant.tensors import is_transient, recording, transformed, version_key


class NotCalibratedError(RuntimeError):
    """A quantizer needs clipping scalars that were found before, but has none."""


@dataclass
class _Calls:
    """What changes with each call.

    These are not attributes of the module, since setting one there takes longer than quantizing a small tensor.
    """

    last_s: Tensor | None = None
    """scalars of the latest call"""
    given: "PrecomputedResult | None" = None
    """result for the next call, if it is with the same tensor"""
    holds: bool = False
    """whether the output of the latest call is kept for the backward pass"""
    trained: int = 0
    """number of calls in training since activation checkpointing last repeated one"""
    trained_s: Tensor | None = None
    """scalars of the latest of these calls"""
    over: bool = False
    """whether a call has been repeated, so that the next call belongs to another step"""

    @property
    def only_s(self) -> Tensor | None:
        """The scalars of the call that is being repeated, if only one call is possible; otherwise None."""
        return self.trained_s if self.trained == 1 else None

    def then(self, s: Tensor) -> None:
        """Record a call in training with its scalars."""
        self.trained = 1 if self.over else self.trained + 1
        self.trained_s, self.over = s, False


class Plan(NamedTuple):
    """Arguments for a training step that solves, remembers and quantizes in one operation."""

    format: IntFormat
    seen: bool
    """whether there are scalars to start from"""
    ndim: int
    """number of dimensions of x"""
    cost: Cost
    search: Search


LATEST = LatestScalars()
"""Scalars that were solved in training, which all quantizers share."""


class PrecomputedResult(NamedTuple):
    """The result of a training step that was computed, and remembered, before the call that uses it."""

    x: Tensor
    written: tuple[int, int]
    """`tensors.version_key` of x at the time of the computation"""
    s: Tensor
    out: Tensor
    held: bool
    """whether `out` is kept for the backward pass, instead of being recomputed"""


class Quantizer(ScalarState):
    """Fake-quantizes tensors with clipping scalars that are solved on each call (dynamic) or constant (static).

    =========  ======================================================  ========
    mode       dynamic                                                 static
    =========  ======================================================  ========
    `train()`  solves s on each call; stores it and a running average  uses `s`
    `eval()`   depends on `eval_mode`; stores nothing                  uses `s`
    =========  ======================================================  ========

    `eval_mode` of a dynamic quantizer: "dynamic" solves s on each batch, as the paper does (the default); "running"
    uses the exponential average of the scalars seen in training; "last" uses the last of them. Like train() and eval(),
    `eval_mode` determines how the state is used and is not part of it. `ScalarState` describes the state.

    In training, no call waits for the device. If activation checkpointing repeats a forward pass within the backward
    pass, the call returns the same result as before, and its scalars are not stored again. In `eval()`, solving raises
    ValueError on NaN and infinity, unless `checks` is false.

    Args:
        format: number format to round to; a number B means signed B-bit integers.
        method: clipping method.
        shape: shape of s: () for one scalar, (K, 1, 1, 1) for one per output channel of a convolution weight.
        gradient: a name in GRADIENTS or a gradient estimator.
        sign_known: if false, the sign of the format is undecided; that of `format` is used until `decide_sign`.
        dynamic: solve on each call if true, static otherwise.
        eval_mode: see above; has no effect on a static quantizer.
        momentum: weight of the newest scalar in `running_s`, above 0 and at most 1.
        synchronize: in training, solve on the tensors of all processes of torch.distributed together; requires a method
            with `pools`.

    Raises:
        ValueError: if an argument is invalid.
        NotCalibratedError: if a call needs scalars but there are none yet. Like all errors of a call, the message
            begins with `name`.
    """

    per_token = False
    """Whether each token has its own scalar, which is solved on each call and never static."""

    def __init__(
        self,
        format: Format | int,
        method: ClippingMethod,
        *,
        shape: Sequence[int] = (),
        gradient: str | Estimator = "mad",
        sign_known: bool = True,
        dynamic: bool = True,
        eval_mode: str = "dynamic",
        momentum: float = 0.1,
        synchronize: bool = False,
    ) -> None:
        if eval_mode not in EVAL_MODES:
            raise ValueError(f"eval_mode={eval_mode!r}: must be one of {', '.join(EVAL_MODES)}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum}: must be above 0 and at most 1")
        if synchronize and not method.pools:
            raise ValueError(f"synchronize=True: clipping {method.name!r} cannot be synchronized over processes")
        super().__init__(as_format(format), shape, sign_known, static=not dynamic)
        self.method, self.gradient = method, gradient_estimator(gradient)
        self.eval_mode, self.momentum = eval_mode, momentum
        self.synchronize = synchronize
        self.features: int | None = None
        """Elements of one sample, if the first dimension is not that of samples alone; set by insertion."""
        self.enabled = True
        """If false, x is returned unchanged, as in the full-precision network."""
        self.checks = True
        """Whether solving in `eval()` raises ValueError on NaN and infinity, which waits for the device. If false, the
        output is NaN instead."""
        self._reusing = False
        self._reused: tuple[Tensor, Tensor] | None = None
        self._calls = _Calls()
        self._plan: Plan | None = None

    @property
    def mode(self) -> str:
        """ "dynamic" or "static"."""
        return "dynamic" if self.dynamic else "static"

    @property
    def _solves(self) -> bool:
        """Whether a call solves for scalars, instead of using existing ones."""
        return self.dynamic and (self.training or self.eval_mode == "dynamic")

    @property
    def ready(self) -> bool:
        """Whether a call in eval() has, or can solve for, the scalars that it needs."""
        return self.has_scalars or (self.dynamic and self.eval_mode == "dynamic")

    @property
    def last_s(self) -> Tensor | None:
        """The scalars of the latest call, for measuring noise; not part of the state."""
        return self._calls.last_s

    @property
    def holds(self) -> bool:
        """Whether the output of the latest call is kept for the backward pass."""
        return self._calls.holds

    def hold(self, whether: bool) -> None:
        """Set `holds`."""
        self._calls.holds = whether

    def latest(self) -> Tensor:
        """Return `last_s`, which must exist.

        Raises:
            NotCalibratedError: if nothing was quantized yet.
        """
        if self.last_s is None:
            raise NotCalibratedError(f"{self.name}: has not quantized any tensor yet")
        return self.last_s

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x.

        If x is empty, as for an expert without tokens, no scalars are stored.

        Args:
            x: any shape and floating dtype.

        Returns:
            x rounded to the levels of the format, in the same shape and dtype.

        Raises:
            TypeError: x is nested or not strided (sparse, for example).
        """
        if not self.enabled:
            return x
        if x.layout is not torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").removeprefix("_")
            raise TypeError(f"{self.name}: a {kind} tensor cannot be quantized")
        if self._skips(x):
            return x
        if not self._reusing:
            return self._called(x)
        if self._reused is None:
            # Not part of what checkpointing records and repeats, where gradients may be off: later calls only reuse it.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                out = self._called(x)
            self._reused = out, out.detach().requires_grad_(out.requires_grad)
        return self._reused[1]

    def _skips(self, x: Tensor) -> bool:
        """Whether to skip x: it is empty, it would need new scalars, and no other process waits for this one."""
        if not self._solves and self.has_scalars:  # decided without the size of x, which exporters do not know
            return False
        return not x.numel() and not (self.synchronize and self.training and dist.is_initialized())

    def _called(self, x: Tensor) -> Tensor:
        """Return the output of a call that is not skipped."""
        calls = self._calls
        given, calls.given = calls.given, None
        if given is not None and (given.x is not x or given.written != version_key(x)):
            given = None  # for another tensor, or for values that were replaced since, e.g. by renormalization
        checkpointed = given is not None and not self._reusing and _checkpointed()
        calls.holds = given is not None and given.held and not checkpointed
        if given is not None:
            # The repeated pass must save the same tensors as this one, and it will quantize with these scalars again.
            return self._record_call(given.s, self._quantize(x, given.s) if checkpointed else given.out)
        if (plan := self.planned(x)) is not None:
            return self._trained_on(x, plan)
        s = self._scalars(x)
        if not is_transient():
            calls.last_s = s
        return self._quantize(x, s)

    def rows(self, x: Tensor) -> Tensor:
        """Return x in the shape to which `dim` and the shape of the scalars refer."""
        return x

    def clipped(self, x: Tensor) -> Tensor:
        """Return the values that are compared with the clipping scalars: x itself."""
        return x

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor, format: Format | None = None) -> Tensor:
        """Return x quantized with clipping scalars s, without a gradient.

        Args:
            x: any shape and floating dtype.
            s: clipping scalars for x.
            format: a format of the same class to use instead of the quantizer's own.
        """
        return kernels.backend(x).fake_quantize(x, s, format or self.format)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Return x quantized with s, like `quantized`, but differentiable."""
        return fake_quantize(x, s, self.format, self.gradient)

    def planned(self, x: Tensor) -> Plan | None:
        """Return the plan for a call that can solve, store and quantize in one operation; None if it cannot."""
        if not (self.training and self.enabled and self.dynamic) or recording() or _in_backward_pass():
            return None
        if x.numel() == 0 or not x.is_floating_point() or (self.synchronize and dist.is_initialized()):
            return None
        plan, format, seen = self._plan, self.format, self._known.seen
        if plan is None or plan.format is not format or plan.seen != seen or plan.ndim != x.ndim:
            plan = self._plan = self._new_plan(format, seen, x.ndim)
        if plan is not None and self.dim is not None and x.shape[0] != len(self.s):
            return None
        return plan

    def _new_plan(self, format: Format, seen: bool, ndim: int) -> Plan | None:
        """Return a plan for tensors of `ndim` dimensions with one scalar, or one per row, if the method has one."""
        found = self.method.in_training(format, seen)
        if found is None or not isinstance(format, IntFormat) or self.dim or ndim < max(self.s.ndim, 1):
            return None
        if self.dim is not None and ndim != max(self.s.ndim, 2):  # in one dimension, each element has its own scalar
            return None
        cost, iterations, tolerance = found
        return Plan(format, seen, ndim, cost, Search(tuple(range(self.s.ndim > 0, ndim)), iterations, tolerance))

    def _trained_on(self, x: Tensor, plan: Plan) -> Tensor:
        """Run a training step in one operation, or reuse the scalars if another quantizer has solved for x."""
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # other streams do not wait for this one
        how = self.method, plan.format, self.dim, plan.seen, stream
        s = LATEST.find(self, x, how)
        if s is not None:
            self.remember(s, self.momentum)
            return self._record_call(s, self._quantize(x, s))
        out = solve_and_quantize(x, partial(self._step, plan), plan.format, self.gradient)
        LATEST.note(self, x, how, self.latest())
        return out

    def _step(self, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """Solve, store and quantize; return the scalars and the quantized x."""
        backend, state = kernels.backend(x), self.remembered()
        s, out = backend.octav_and_quantize(x, plan.cost, plan.format, plan.search, state, self.method.warm)
        self._know_scalars()
        return s, self._record_call(s, out)

    def _record_call(self, s: Tensor, out: Tensor) -> Tensor:
        """Record the scalars of a call in training, and return its output."""
        self._calls.last_s = s
        self._calls.then(s)
        return out

    def remembered(self) -> Remembered:
        """Return the state in the form that kernels use."""
        return self._remembered(self.momentum)

    def set_result(self, given: PrecomputedResult) -> None:
        """Provide the result for the next call; its scalars are already stored in `remembered`."""
        self._calls.given = given
        self._know_scalars()

    def discard_result(self) -> None:
        """Discard the result for the next call."""
        self._calls.given = None

    def _scalars(self, x: Tensor) -> Tensor:
        """Return the scalars of a call, and store them in training."""
        if not self._solves:
            return self._constant_scalars()
        known = self.has_scalars
        start = self.s if known and self.method.warm else None
        pointed = self.orientation if known else None
        if not self.training:
            check = self.checks and not is_transient()
            return self._solve(x, Call(check=check, start=start, orientation=pointed))
        repeated = _in_backward_pass()
        s = self._calls.only_s if repeated else None  # from the pass that is being repeated
        if s is None:
            pool = Processes() if self.synchronize and dist.is_initialized() else None
            s = self._solve(x, Call(check=False, start=start, training=True, pool=pool, orientation=pointed))
        if repeated:
            self._calls.over = True
        else:
            self._remember(s)
            if not is_transient():
                self._calls.then(s)
        return s

    def _remember(self, s: Tensor) -> None:
        try:
            self.remember(s, self.momentum)
        except RuntimeError as error:
            if not transformed():
                raise
            raise RuntimeError(
                f"{self.name}: a dynamic quantizer writes to its buffers in training, but transforms of torch.func "
                f"allow writes to their own arguments only: pass the buffers as well, or use eval() or "
                f"freeze(model, ...)"
            ) from error

    def _solve(self, x: Tensor, call: Call, format: Format | None = None) -> Tensor:
        format = format or self.format
        try:
            s = self.method.solve(x, format, self.dim, call)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if isinstance(format, IntFormat) and format.oriented:
            return oriented(x, s, format, call.orientation, call.pool)
        return s

    def _constant_scalars(self) -> Tensor:
        if not self.has_scalars:
            what = f"eval_mode={self.eval_mode!r}" if self.dynamic else self.mode
            raise NotCalibratedError(
                f"{self.name} ({what}) has no clipping scalars yet: calibrate it on batches that reach it, train it, "
                f"or load a state with scalars"
            )
        return self.with_orientation(self.s if not self.dynamic or self.eval_mode == "last" else self.running_s)

    def scalars_of(self, x: Tensor, check: bool = True, format: Format | None = None) -> Tensor:
        """Return the scalars that the clipping method finds on x, without a start, converged; nothing is stored.

        Args:
            x: any shape, floating dtype.
            check: raise ValueError on NaN and infinity, which waits for the device.
            format: a format of the same class to use instead of the quantizer's own.

        Raises:
            ValueError: if x contains NaN or infinity and `check` is true.
        """
        return self._solve(x, Call(check=check), format)

    @staticmethod
    @contextmanager
    def reusing(quantizers: Sequence["Quantizer"]) -> Iterator[None]:
        """Return a context in which each quantizer quantizes only in its first call, and returns this result in others.

        Use it for weights, which stay the same while the gradients of several batches are accumulated. On leaving the
        context, the sum of the gradients passes through the quantization once.
        """
        for q in quantizers:
            q._reusing = True
        try:
            yield
            reused = [q._reused for q in quantizers if q._reused is not None and q._reused[1].grad is not None]
            torch.autograd.backward([out for out, _ in reused], [leaf.grad for _, leaf in reused])
        finally:
            for q in quantizers:
                q._reusing, q._reused = False, None

    def extra_repr(self) -> str:
        sign = ("signed" if self.format.signed else "unsigned") if self.decided else "sign open"
        method = f"{self.mode} {self.method.name}"
        return f"bits={self.format.bits}, {sign}, per {self.granularity}, {method}, gradient={self.gradient}"


def _itself(t: Tensor) -> Tensor:
    return t


def _checkpointed() -> bool:
    """Whether saved-tensor hooks are active, as under activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _in_backward_pass() -> bool:
    """Whether a backward pass is running: a forward pass within it is one that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
