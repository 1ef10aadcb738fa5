"""A quantizer as a module: when its clipping scalars are solved, and what it remembers."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat_runner.quant import kernels
from qat_runner.quant.clipping import CLIPPING_METHODS
from qat_runner.quant.estimators import GRADIENTS, fake_quantize
from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels import eager
from qat_runner.quant.pool import Processes


class NotCalibratedError(RuntimeError):
    """A quantizer that does not solve its clipping scalars has none."""


class _Known(NamedTuple):
    """What a quantizer knows of its state without waiting for the device."""

    signed: bool
    static: bool
    seen: bool


@dataclass
class _Trained:
    """The scalars of the calls in training since activation checkpointing last repeated one."""

    calls: int = 0
    s: Tensor | None = None
    """of the latest call"""
    over: bool = False
    """a call has been repeated: what comes next is of another step"""

    @property
    def only_s(self) -> Tensor | None:
        """The scalars of the call that is repeated, if there is one alone that it can be."""
        return self.s if self.calls == 1 else None

    def then(self, s: Tensor) -> "_Trained":
        """After one more call."""
        return _Trained(1 if self.over else self.calls + 1, s)


EVAL_MODES = ("dynamic", "running", "last")
"""What a dynamic quantizer does in eval()."""
LATER = ("seen", "static")
"""Of a quantizer's state, what states of old do not tell."""


class Quantizer(nn.Module):
    """Fake-quantizes what it is given, with clipping scalars that are solved anew (dynamic) or constant (static).

    | mode      | dynamic                                                    | static   |
    |-----------|------------------------------------------------------------|----------|
    | `train()` | solves s on each call; remembers it, and a running average | uses `s` |
    | `eval()`  | by `eval_mode`; remembers nothing                          | uses `s` |

    `eval_mode` of a dynamic quantizer: "dynamic" solves s on each batch, as the paper does (the default); "running"
    uses the exponential average of the scalars seen in training; "last" uses the last of them. It says how to read the
    state, as train() and eval() do, and is no part of it.

    The state dict holds

    - `s` and `running_s`: shape `shape`, never less than float32, also after `.half()`;
    - `seen`: [], 1 once there are scalars, 0 before;
    - `static`: [], 1 if static, 0 if dynamic: a quantizer becomes what the state that it loads was;
    - `grid`: [2], bits and signed: the sign is taken over, other bits are refused;
    - `batches`: int64, []: how many calls the scalars stem from.

    A state dict without any of these keys, such as a full-precision model's, loads without complaint and changes
    nothing; one of before `seen` and `static` leaves the quantizer dynamic or static as it is.

    All but `batches` are floating, so that averaging states (EMA, SWA) averages them: `seen` of an average that began
    before the first scalar is the share of the time in which there were scalars, and what `s` is then divided by. An
    average is static as soon as what it follows is.

    In training no call waits for the device, and a forward pass that activation checkpointing repeats within the
    backward pass gives what it gave before, and is not remembered again. In `eval()`, solving refuses NaN and infinity
    with a ValueError.

    Args:
        bits: 2 to 16.
        signed: two's complement grid if true, unsigned otherwise; None leaves it open (signed until `decide_sign`).
        shape: shape of s: () for one scalar, (K, 1, 1, 1) for one per output channel of a convolution weight.
        clipping: a name in CLIPPING_METHODS, or a function (x, bits, signed, dim, *, check) -> s of shape `shape`.
        gradient: "ste", "pwl" or "mad".
        dynamic: solve on each call if true, static otherwise.
        eval_mode: see above; without effect on a static quantizer.
        momentum: weight of the newest scalar in `running_s`, above 0 and at most 1.
        warm_iterations: at most so many reads of x a call in training, once there is a scalar to start from; for
            clipping methods that take a start (octav). None starts each call anew.
        synchronize: in training, solve on the tensors of all processes of torch.distributed together; octav and max.
        **options: passed to the clipping method, e.g. iterations=10, q=99.9.

    Raises:
        ValueError, TypeError: an argument out of range; an option that the clipping method does not have.
        NotCalibratedError: on a call that needs scalars when there are none yet. It begins with `name`, as all errors
            of a call do.
    """

    s: Tensor
    running_s: Tensor
    batches: Tensor
    grid: Tensor
    seen: Tensor
    static: Tensor

    def __init__(
        self,
        bits: int,
        signed: bool | None = True,
        shape: Sequence[int] = (),
        clipping: str | Callable[..., Tensor] = "octav",
        gradient: str = "mad",
        dynamic: bool = True,
        eval_mode: str = "dynamic",
        momentum: float = 0.1,
        warm_iterations: int | None = 6,
        synchronize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.bits = Grid(bits).bits
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient={gradient!r}: must be one of {', '.join(GRADIENTS)}")
        if eval_mode not in EVAL_MODES:
            raise ValueError(f"eval_mode={eval_mode!r}: must be one of {', '.join(EVAL_MODES)}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum}: must be above 0 and at most 1")
        self.gradient, self.eval_mode, self.momentum = gradient, eval_mode, momentum
        self.dim = next((d for d, n in enumerate(shape) if n != 1), 0 if shape else None)
        if warm_iterations is not None and warm_iterations < 1:
            raise ValueError(f"warm_iterations={warm_iterations}: must be 1 or more")
        self.clipping_name, self.solve = _clipping_method(clipping, options)
        if synchronize and "pool" not in inspect.signature(self.solve).parameters:
            raise ValueError(
                f"clipping {self.clipping_name!r} cannot be synchronized over processes: octav and max can"
            )
        self.synchronize = synchronize
        takes_start = {"init", "iterations", "tolerance"} <= inspect.signature(self.solve).parameters.keys()
        self.warm_iterations = warm_iterations if takes_start else None
        self.register_buffer("s", torch.zeros(tuple(shape)))
        self.register_buffer("running_s", torch.zeros(tuple(shape)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("grid", torch.tensor([bits, signed is not False], dtype=torch.float32))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("static", torch.tensor(float(not dynamic)))
        self.decided = signed is not None
        self._known = _Known(signed is not False, not dynamic, False)
        self._known_of = self._version_of_state()
        self.name = "quantizer"
        """What errors call it; insertion puts the tensor's name here."""
        self.enabled = True
        """False passes x on unchanged, as in the full-precision network."""
        self.last_s: Tensor | None = None
        """The scalars of the latest call, for whoever measures noise; not part of the state."""
        self._reusing = False
        self._reused: tuple[Tensor, Tensor] | None = None
        self._trained = _Trained()

    def decide_sign(self, signed: bool) -> None:
        """Settle whether the grid is signed."""
        self.decided = True
        self.grid[1] = float(signed)
        self._know(signed=signed)

    @property
    def signed(self) -> bool:
        """Whether the grid is signed."""
        return self._now().signed

    @property
    def dynamic(self) -> bool:
        """Whether scalars are solved anew on each call, in training at least."""
        return not self._now().static

    @property
    def mode(self) -> str:
        """ "dynamic" or "static"."""
        return "dynamic" if self.dynamic else "static"

    @property
    def granularity(self) -> str:
        """ "tensor" or "channel"."""
        return "tensor" if self.dim is None else "channel"

    @property
    def ready(self) -> bool:
        """Whether a call in eval() would find the scalars it needs."""
        return self.has_scalars or (self.dynamic and self.eval_mode == "dynamic")

    @property
    def has_scalars(self) -> bool:
        """Whether `s` and `running_s` mean anything."""
        return self._now().seen

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape and floating dtype -> the same shape and dtype, on the grid."""
        if not self.enabled:
            return x
        if self._reused is not None:
            return self._reused[1]
        s = self._scalars(x)
        if not torch.compiler.is_compiling():
            self.last_s = s
        out = self._quantize(x, s)
        if self._reusing:
            self._reused = out, out.detach().requires_grad_(out.requires_grad)
            return self._reused[1]
        return out

    @property
    def format(self) -> Grid:
        """The grid that values come to lie on."""
        return Grid(self.bits, self.signed)

    @property
    def levels(self) -> list[float]:
        """All values that there are, in units of s, rising."""
        grid = self.format
        return [code / grid.levels_per_scalar for code in range(grid.lowest, grid.highest + 1)]

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor) -> Tensor:
        """x, any shape and floating dtype, as clipping scalars s quantize it; without a gradient."""
        return kernels.backend(x).fake_quantize(x, s, self.format)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """As `quantized`, with a gradient."""
        return fake_quantize(x, s, self.bits, self.signed, self.gradient)

    def _scalars(self, x: Tensor) -> Tensor:
        """The scalars of a call, remembered where they are to be."""
        if not (self.dynamic and (self.training or self.eval_mode == "dynamic")):
            return self._constant_scalars()
        if not self.training:
            return self._solve(x, check=not torch.compiler.is_compiling(), **self._start())
        repeated = _in_backward_pass()
        s = self._trained.only_s if repeated else None  # of the pass that is repeated
        if s is None:
            together = {"pool": Processes()} if self.synchronize and dist.is_initialized() else {}
            s = self._solve(x, check=False, **self._start(), **together)
        if repeated:
            self._trained.over = True
        else:
            self._remember(s)
            if not torch.compiler.is_compiling():
                self._trained = self._trained.then(s)
        return s

    def _solve(self, x: Tensor, **options: Any) -> Tensor:
        try:
            s: Tensor = self.solve(x, self.bits, self.signed, self.dim, **options)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return s

    def _constant_scalars(self) -> Tensor:
        known = self._now()
        if not known.seen:
            what = self.mode if known.static else f"eval_mode={self.eval_mode!r}"
            raise NotCalibratedError(
                f"{self.name} ({what}) has no clipping scalars yet: calibrate it on batches that reach it, train it, "
                f"or load a state that has them"
            )
        return self.s if known.static or self.eval_mode == "last" else self.running_s

    def _start(self) -> dict[str, Any]:
        """The scalars of the previous step are an excellent start for this one's; evaluation converges all the same."""
        if self.warm_iterations is None or not self.has_scalars:
            return {}
        if not self.training:
            return {"init": self.s}
        return {"init": self.s, "iterations": self.warm_iterations, "tolerance": 1e-4}

    @torch.no_grad()
    def _remember(self, s: Tensor) -> None:
        # A batch that is not finite ends a run, but must not spoil the average for whoever goes on from it.
        s = s.to(self.s.dtype)
        s = torch.where(torch.isfinite(s), s, self.s)
        self.s.copy_(s)
        self.running_s.lerp_(s, self.momentum if self.has_scalars else 1.0)
        self.batches.add_(1)
        self._know_scalars()

    def scalars_of(self, x: Tensor) -> Tensor:
        """The scalars that the clipping method finds on x, from cold and to convergence; nothing is remembered.

        Raises:
            ValueError: x holds NaN or infinity.
        """
        return self._solve(x, check=True)

    @torch.no_grad()
    def assign(self, s: Tensor, batches: int = 1) -> None:
        """Have these scalars, found elsewhere, such as on calibration batches.

        Args:
            s: in units of x, broadcastable to `shape`.
            batches: how many calls they stem from.

        Raises:
            ValueError: s is negative, NaN or infinite.
        """
        if not bool((torch.isfinite(s) & (s >= 0)).all()):
            raise ValueError(f"{self.name}: clipping scalars must be finite and not negative")
        self.s.copy_(s)
        self.running_s.copy_(s)
        self.batches.fill_(batches)
        self._know_scalars()

    @torch.no_grad()
    def freeze(self, s: Tensor) -> None:
        """Be static from now on, with these scalars; as `assign`."""
        self.assign(s, max(int(self.batches), 1))
        self.static.fill_(1)
        self._know(static=True)

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

    def _now(self) -> _Known:
        """What the state says, read from the device only where someone else may have written to it.

        In training that is never asked once there are scalars: what DistributedDataParallel broadcasts at every step
        says nothing new.
        """
        unchanged = (self.training and self._known.seen) or self._known_of == self._version_of_state()
        if not (eager.recording() or unchanged):
            self._read()
        return self._known

    @torch.no_grad()
    def _read(self) -> None:
        """Look at the state, on whatever device it is."""
        if self.seen.is_meta:
            return
        seen = float(self.seen)
        if 0 < seen < 1:  # an average that began before the first scalar
            for t in self._averaged():
                t.div_(seen)
        self._know(signed=round(float(self.grid[1])) > 0, static=float(self.static) > 0, seen=seen > 0)

    def _averaged(self) -> tuple[Tensor, ...]:
        """What of the state is zero before the first scalar."""
        return self.s, self.running_s, self.seen

    def _know_scalars(self) -> None:
        """Note, in the state as well, that there are scalars."""
        if not self._known.seen:
            self.seen.fill_(1)
            self._known = self._known._replace(seen=True)
        self._known_of = self._version_of_state()

    def _know(self, **what: bool) -> None:
        """Note what the state says now."""
        self._known = self._known._replace(**what)
        self._known_of = self._version_of_state()

    def _version_of_state(self) -> tuple[int, int]:
        """Changes with every write to the state. Whoever writes to it from outside writes to all of its buffers."""
        if eager.recording():
            return self._known_of
        return id(self.batches), -1 if self.batches.is_inference() else self.batches._version

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not any(prefix + name in state_dict for name in self._buffers):
            return
        saved_bits = round(float(state_dict.get(f"{prefix}grid", self.grid)[0]))
        if saved_bits != self.bits:
            error_msgs.append(f"{prefix}grid: scalars found for {saved_bits} bits do not suit {self.bits} bits")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in LATER:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
        if f"{prefix}seen" not in state_dict:
            self.seen.copy_(self.batches.clamp(max=1))
        self.decided = True
        self._read()
        self._loaded(prefix, missing_keys)

    def _loaded(self, prefix: str, missing_keys: list[str]) -> None:
        """For a subclass that can do without some of its state: called after loading, with what was missing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():  # scalars stay in full precision (section 4), also in a half-precision model
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        sign = ("signed" if self.signed else "unsigned") if self.decided else "sign open"
        method = f"{self.mode} {self.clipping_name}"
        return f"bits={self.bits}, {sign}, per {self.granularity}, {method}, gradient={self.gradient}"


def _in_backward_pass() -> bool:
    """Whether autograd is at work: a forward pass inside of it is one that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _clipping_method(
    clipping: str | Callable[..., Tensor], options: dict[str, Any]
) -> tuple[str, Callable[..., Tensor]]:
    """Name and function of a clipping method, options bound; misfits are refused now, not in the first step."""
    if isinstance(clipping, str):
        if clipping not in CLIPPING_METHODS:
            raise ValueError(f"clipping={clipping!r}: must be one of {', '.join(CLIPPING_METHODS)}")
        name, method = clipping, CLIPPING_METHODS[clipping]
    else:
        name, method = getattr(clipping, "__name__", type(clipping).__name__), clipping
    known = [p for p in inspect.signature(method).parameters if p not in _ARGUMENTS]
    for option in options:
        if option not in known:
            raise TypeError(f"clipping {name!r} has no option {option!r}, only {', '.join(known) or 'none'}")
    solve = partial(method, **options)
    solve(torch.ones(1), 8, True, None, check=True)  # values out of range are refused by the method itself
    return name, solve


_ARGUMENTS = ("x", "bits", "signed", "dim", "init", "tolerance", "check", "pool")
"""Of a clipping method, what is no option."""
