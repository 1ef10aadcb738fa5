"""A quantizer as a module that uses a clipping method: when scalars are solved, and how x is rounded."""

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
from qat_runner.quant.repeated import LatestScalars
from qat_runner.quant.state import ScalarState
from qat_runner.quant.tensors import fleeting, recording, transformed, written


class NotCalibratedError(RuntimeError):
    """A quantizer that does not solve its clipping scalars has none."""


@dataclass
class _Calls:
    """What changes with each call; beside the module, which takes longer to set than a small tensor to quantize."""

    last_s: Tensor | None = None
    """the scalars of the latest"""
    given: "Given | None" = None
    """for the next, if it is with that tensor itself"""
    holds: bool = False
    """whether the output of the latest is kept for the backward pass"""
    trained: int = 0
    """in training, since activation checkpointing last repeated one"""
    trained_s: Tensor | None = None
    """the scalars of the latest of them"""
    over: bool = False
    """one has been repeated: what comes next is of another step"""

    @property
    def only_s(self) -> Tensor | None:
        """The scalars of the call that is repeated, if there is one alone that it can be."""
        return self.trained_s if self.trained == 1 else None

    def then(self, s: Tensor) -> None:
        """One more call in training."""
        self.trained = 1 if self.over else self.trained + 1
        self.trained_s, self.over = s, False


class Plan(NamedTuple):
    """How a step of training is done in one operation."""

    format: IntFormat
    seen: bool
    """whether there are scalars to start from"""
    ndim: int
    """of x"""
    cost: Cost
    search: Search


LATEST = LatestScalars()
"""of training"""


class Given(NamedTuple):
    """What a call will find done already: a step of training, remembered."""

    x: Tensor
    written: tuple[int, int]
    """of x, at the time"""
    s: Tensor
    out: Tensor
    held: bool
    """out is kept for the backward pass, instead of being computed again"""


class Quantizer(ScalarState):
    """Fake-quantizes what it is given, with clipping scalars that are solved anew (dynamic) or constant (static).

    =========  ==========================================================  ========
    mode       dynamic                                                     static
    =========  ==========================================================  ========
    `train()`  solves s on each call; remembers it, and a running average  uses `s`
    `eval()`   by `eval_mode`; remembers nothing                           uses `s`
    =========  ==========================================================  ========

    `eval_mode` of a dynamic quantizer: "dynamic" solves s on each batch, as the paper does (the default); "running"
    uses the exponential average of the scalars seen in training; "last" uses the last of them. It says how to read the
    state, as train() and eval() do, and is no part of it. The state is that of `ScalarState`.

    In training no call waits for the device, and a forward pass that activation checkpointing repeats within the
    backward pass gives what it gave before, and is not remembered again. In `eval()`, solving refuses NaN and infinity
    with a ValueError, unless `checks` is false.

    Args:
        format: what values are rounded to; a number stands for the signed integers of so many bits.
        method: how scalars are found.
        shape: shape of s: () for one scalar, (K, 1, 1, 1) for one per output channel of a convolution weight.
        gradient: a name in GRADIENTS, or an estimator.
        sign_known: false leaves the sign of the format open (the format's until `decide_sign`).
        dynamic: solve on each call if true, static otherwise.
        eval_mode: see above; without effect on a static quantizer.
        momentum: weight of the newest scalar in `running_s`, above 0 and at most 1.
        synchronize: in training, solve on the tensors of all processes of torch.distributed together; for methods that
            say `pools`.

    Raises:
        ValueError: an argument out of range.
        NotCalibratedError: on a call that needs scalars when there are none yet. It begins with `name`, as all errors
            of a call do.
    """

    per_token = False
    """Whether each token has a scalar of its own, which is solved as it comes and never static."""

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
            raise ValueError(f"clipping {method.name!r} cannot be synchronized over processes")
        super().__init__(as_format(format), shape, sign_known, static=not dynamic)
        self.method, self.gradient = method, gradient_estimator(gradient)
        self.eval_mode, self.momentum = eval_mode, momentum
        self.synchronize = synchronize
        self.features: int | None = None
        """Elements of one sample, where the first dimension is not that of samples alone; insertion says it."""
        self.enabled = True
        """False passes x on unchanged, as in the full-precision network."""
        self.checks = True
        """Whether solving in `eval()` refuses NaN and infinity, for which it waits; else NaN is what comes out."""
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
        """Whether a call finds scalars, instead of using those that there are."""
        return self.dynamic and (self.training or self.eval_mode == "dynamic")

    @property
    def ready(self) -> bool:
        """Whether a call in eval() would find the scalars it needs."""
        return self.has_scalars or (self.dynamic and self.eval_mode == "dynamic")

    @property
    def last_s(self) -> Tensor | None:
        """The scalars of the latest call, for whoever measures noise; not part of the state."""
        return self._calls.last_s

    @property
    def holds(self) -> bool:
        """Whether the output of the latest call is kept for the backward pass."""
        return self._calls.holds

    def hold(self, whether: bool) -> None:
        """Say whether it is."""
        self._calls.holds = whether

    @property
    def latest(self) -> Tensor:
        """`last_s`, which there must be.

        Raises:
            NotCalibratedError: nothing was quantized yet.
        """
        if self.last_s is None:
            raise NotCalibratedError(f"{self.name}: has quantized nothing yet")
        return self.last_s

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape and floating dtype -> the same shape and dtype, on the levels of the format.

        Of x without elements, as an expert without a token has it, nothing is remembered.
        """
        if not self.enabled or self._spared(x):
            return x
        if not self._reusing:
            return self._called(x)
        if self._reused is None:
            # Outside of what checkpointing looks at and repeats, where gradients may be off: later calls do none of it.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                out = self._called(x)
            self._reused = out, out.detach().requires_grad_(out.requires_grad)
        return self._reused[1]

    def _spared(self, x: Tensor) -> bool:
        """Whether scalars are wanted and there is nothing in x, and nobody waits for this one to solve together."""
        if not self._solves and self.has_scalars:  # then x is not asked, since exporters do not know its size
            return False
        return not x.numel() and not (self.synchronize and self.training and dist.is_initialized())

    def _called(self, x: Tensor) -> Tensor:
        """The output of a call that is not spared."""
        calls = self._calls
        given, calls.given = calls.given, None
        if given is not None and (given.x is not x or given.written != written(x)):
            given = None  # of another tensor, or of what its module has replaced since, such as a norm that is kept
        checkpointed = given is not None and not self._reusing and _checkpointed()
        calls.holds = given is not None and given.held and not checkpointed
        if given is not None:
            # What checkpointing repeats has to save what it saves now: it will quantize with these scalars once more.
            return self._took(given.s, self._quantize(x, given.s) if checkpointed else given.out)
        if (plan := self.planned(x)) is not None:
            return self._trained_on(x, plan)
        s = self._scalars(x)
        if not fleeting():
            calls.last_s = s
        return self._quantize(x, s)

    def rows(self, x: Tensor) -> Tensor:
        """x in the shape that `dim` and the scalars are of."""
        return x

    def clipped(self, x: Tensor) -> Tensor:
        """What of x is held against the scalars: x itself."""
        return x

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor, format: Format | None = None) -> Tensor:
        """x, any shape and floating dtype, as clipping scalars s quantize it; without a gradient.

        Args:
            x, s: see there.
            format: another one than the quantizer's, of its kind.
        """
        return kernels.backend(x).fake_quantize(x, s, format or self.format)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """As `quantized`, with a gradient."""
        return fake_quantize(x, s, self.format, self.gradient)

    def planned(self, x: Tensor) -> Plan | None:
        """How a call that solves, remembers and quantizes can do so in one operation; None: it is no such call."""
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
        """A plan, if the clipping method has one, for tensors of so many dimensions with one scalar, or one a row."""
        found = self.method.in_training(format, seen)
        if found is None or not isinstance(format, IntFormat) or self.dim or ndim < max(self.s.ndim, 1):
            return None
        if self.dim is not None and ndim != max(self.s.ndim, 2):  # with one dimension each element has its own scalar
            return None
        cost, iterations, tolerance = found
        return Plan(format, seen, ndim, cost, Search(tuple(range(self.s.ndim > 0, ndim)), iterations, tolerance))

    def _trained_on(self, x: Tensor, plan: Plan) -> Tensor:
        """A step of training in one operation; of a tensor that another quantizer has solved, what is left of it."""
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # another would not wait for this one
        how = self.method, plan.format, self.dim, plan.seen, stream
        s = LATEST.find(self, x, how)
        if s is not None:
            self.remember(s, self.momentum)
            return self._took(s, self._quantize(x, s))
        out = solve_and_quantize(x, partial(self._step, plan), plan.format, self.gradient)
        LATEST.note(self, x, how, self.latest)
        return out

    def _step(self, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """Solve, remember and quantize: the scalars and x quantized."""
        backend, state = kernels.backend(x), self.remembered()
        s, out = backend.octav_and_quantize(x, plan.cost, plan.format, plan.search, state, self.method.warm)
        self._know_scalars()
        return s, self._took(s, out)

    def _took(self, s: Tensor, out: Tensor) -> Tensor:
        """Note the scalars of a call in training; returns its output."""
        self._calls.last_s = s
        self._calls.then(s)
        return out

    def remembered(self) -> Remembered:
        """The state as kernels take it."""
        return self._remembered(self.momentum)

    def give(self, given: Given) -> None:
        """Have the next call find this, whose scalars `remembered` has got."""
        self._calls.given = given
        self._know_scalars()

    def take_back(self) -> None:
        """Have the next call find nothing."""
        self._calls.given = None

    def _scalars(self, x: Tensor) -> Tensor:
        """The scalars of a call, remembered where they are to be."""
        if not self._solves:
            return self._constant_scalars()
        known = self.has_scalars
        start = self.s if known and self.method.warm else None
        pointed = self.orientation if known else None
        if not self.training:
            check = self.checks and not fleeting()
            return self._solve(x, Call(check=check, start=start, orientation=pointed))
        repeated = _in_backward_pass()
        s = self._calls.only_s if repeated else None  # of the pass that is repeated
        if s is None:
            pool = Processes() if self.synchronize and dist.is_initialized() else None
            s = self._solve(x, Call(check=False, start=start, training=True, pool=pool, orientation=pointed))
        if repeated:
            self._calls.over = True
        else:
            self._remember(s)
            if not fleeting():
                self._calls.then(s)
        return s

    def _remember(self, s: Tensor) -> None:
        try:
            self.remember(s, self.momentum)
        except RuntimeError as error:
            if not transformed():
                raise
            raise RuntimeError(
                f"{self.name}: dynamic in training, it writes to its buffers, which a transform of torch.func allows "
                f"for its own arguments alone: pass the buffers as well, or use eval() or freeze(model, ...)"
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
                f"or load a state that has them"
            )
        return self.with_orientation(self.s if not self.dynamic or self.eval_mode == "last" else self.running_s)

    def scalars_of(self, x: Tensor, check: bool = True, format: Format | None = None) -> Tensor:
        """The scalars that the clipping method finds on x, from cold and to convergence; nothing is remembered.

        Args:
            x: any shape, floating dtype.
            check: whether NaN and infinity are refused, for which it waits for the device.
            format: another one than the quantizer's, of its kind.

        Raises:
            ValueError: x holds NaN or infinity, under `check`.
        """
        return self._solve(x, Call(check=check), format)

    @staticmethod
    @contextmanager
    def reusing(quantizers: Sequence["Quantizer"]) -> Iterator[None]:
        """While open, each quantizes the tensor of its first call only, and gives the result to all other calls.

        For weights, which stay the same while the gradients of several batches add up. On leaving, the sum of the
        gradients passes through the quantization, once.
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
    """Whether something decides what is saved for the backward pass, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _in_backward_pass() -> bool:
    """Whether autograd is at work: a forward pass inside of it is one that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
