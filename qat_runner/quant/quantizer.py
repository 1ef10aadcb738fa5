"""A quantizer as a module: when its clipping scalars are solved, and what it remembers."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat_runner.quant import kernels
from qat_runner.quant.clipping import CLIPPING_METHODS
from qat_runner.quant.estimators import GRADIENTS, fake_quantize
from qat_runner.quant.grid import Grid
from qat_runner.quant.pool import Processes

EVAL_MODES = ("dynamic", "running", "frozen")
"""What a dynamic quantizer does in eval()."""


class Quantizer(nn.Module):
    """Fake-quantizes what it is given, with clipping scalars that are solved anew (dynamic) or held (static).

    | state           | dynamic                                                        | static           |
    |-----------------|----------------------------------------------------------------|------------------|
    | `train()`       | solves s on each call; remembers it, and a running average     | uses `s`         |
    | `eval()`        | by `eval_mode`; remembers nothing                              | uses `s`         |
    | `calibrating()` | passes x on; `s` becomes the mean of the scalars of all calls  | as dynamic       |

    `eval_mode` of a dynamic quantizer: "dynamic" solves s on each batch, as the paper does (the default); "running"
    uses the exponential average of the scalars seen in training; "frozen" uses the last of them.

    The state dict holds `s` and `running_s` (shape `shape`, never less than float32, also after `.half()`), `batches`
    (int64, []: how many calls they stem from) and `grid` (int64, [2]: bits and signed). Loading takes over the sign. A
    state dict without these keys, such as a full-precision model's, loads without complaint and changes nothing; one of
    other bits is refused.

    In training no call waits for the device. In `eval()`, solving refuses NaN and infinity with a ValueError.

    Args:
        bits: 2 to 16.
        signed: two's complement grid if true, unsigned otherwise; None leaves it open (signed until `decide_sign`).
        shape: shape of s: () for one scalar, (K, 1, 1, 1) for one per output channel of a convolution weight.
        clipping: a name in CLIPPING_METHODS, or a function (x, bits, signed, dim, *, check) -> s of shape `shape`.
        gradient: "ste", "pwl" or "mad".
        dynamic: solve on each call if true, hold calibrated scalars otherwise.
        eval_mode: see above; without effect on a static quantizer.
        momentum: weight of the newest scalar in `running_s`, above 0 and at most 1.
        warm_iterations: at most so many reads of x a call in training, once there is a scalar to start from; for
            clipping methods that take a start (octav). None starts each call anew.
        synchronize: in training, solve on the tensors of all processes of torch.distributed together; octav and max.
        **options: passed to the clipping method, e.g. iterations=10, q=99.9.

    Raises:
        ValueError, TypeError: an argument out of range; an option that the clipping method does not have.
        RuntimeError: on a call that needs scalars when there are none yet.
    """

    s: Tensor
    running_s: Tensor
    batches: Tensor
    grid: Tensor

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
        self.gradient, self.dynamic, self.eval_mode, self.momentum = gradient, dynamic, eval_mode, momentum
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
        self.register_buffer("grid", torch.tensor([bits, 1]))
        self._batches = 0  # the same number where reading it costs no wait
        self.signed, self.decided = True, False
        if signed is not None:
            self.decide_sign(signed)
        self._calibrating = False
        self.enabled = True
        """False passes x on unchanged, as in the full-precision network."""
        self.last_s: Tensor | None = None
        """The scalars of the latest call, for whoever measures noise; not part of the state."""
        self._holding = False
        self._held: tuple[Tensor, Tensor] | None = None

    def decide_sign(self, signed: bool) -> None:
        """Settle whether the grid is signed."""
        self.signed, self.decided = signed, True
        self.grid[1] = int(signed)

    @property
    def granularity(self) -> str:
        """ "tensor" or "channel"."""
        return "tensor" if self.dim is None else "channel"

    @property
    def ready(self) -> bool:
        """Whether a call in eval() would find the scalars it needs."""
        return self._batches > 0 or (self.dynamic and self.eval_mode == "dynamic")

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape and floating dtype -> the same shape and dtype, on the grid (or unchanged while calibrating)."""
        if not self.enabled:
            return x
        if self._calibrating:
            self._remember(self.solve(x, self.bits, self.signed, self.dim, check=True))
            return x
        if self._held is not None:
            return self._held[1]
        s = self._scalars(x)
        if not torch.compiler.is_compiling():
            self.last_s = s
        out = self._quantize(x, s)
        if self._holding:
            self._held = out, out.detach().requires_grad_(out.requires_grad)
            return self._held[1]
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
        return kernels.backend().fake_quantize(x, s, self.format)

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """As `quantized`, with a gradient."""
        return fake_quantize(x, s, self.bits, self.signed, self.gradient)

    def _scalars(self, x: Tensor) -> Tensor:
        if self.dynamic and (self.training or self.eval_mode == "dynamic"):
            check = not (self.training or torch.compiler.is_compiling())
            together = {"pool": Processes()} if self.synchronize and self.training and dist.is_initialized() else {}
            s = self.solve(x, self.bits, self.signed, self.dim, check=check, **self._start(), **together)
            if self.training:
                self._remember(s)
            return s
        if self._batches == 0:
            what = "static" if not self.dynamic else f"eval_mode={self.eval_mode!r}"
            raise RuntimeError(
                f"quantizer ({what}) has no clipping scalars yet: calibrate it, train it or load a state that has them"
            )
        return self.running_s if self.dynamic and self.eval_mode == "running" else self.s

    def _start(self) -> dict[str, Any]:
        """The scalars of the previous step are an excellent start for this one's; evaluation converges all the same."""
        if self.warm_iterations is None or self._batches == 0:
            return {}
        if not self.training:
            return {"init": self.s}
        return {"init": self.s, "iterations": self.warm_iterations, "tolerance": 1e-4}

    @torch.no_grad()
    def _remember(self, s: Tensor) -> None:
        self._batches += 1
        self.batches.add_(1)
        s = s.to(self.s.dtype)
        if self._calibrating:  # cumulative mean: section 5
            self.s.lerp_(s, 1 / self._batches)
            self.running_s.copy_(self.s)
        else:
            # A batch that is not finite ends a run, but must not spoil the average for whoever goes on from it.
            s = torch.where(torch.isfinite(s), s, self.s)
            self.s.copy_(s)
            self.running_s.lerp_(s, self.momentum if self._batches > 1 else 1.0)

    @torch.no_grad()
    def freeze(self, s: Tensor) -> None:
        """Be static from now on, with these scalars.

        Args:
            s: in units of x, broadcastable to `shape`.

        Raises:
            ValueError: s is negative, NaN or infinite.
        """
        if not bool((torch.isfinite(s) & (s >= 0)).all()):
            raise ValueError("clipping scalars must be finite and not negative")
        self.s.copy_(s)
        self.running_s.copy_(self.s)
        self._batches = max(self._batches, 1)
        self.batches.fill_(self._batches)
        self.dynamic = False

    @staticmethod
    @contextmanager
    def holding(quantizers: Sequence["Quantizer"]) -> Iterator[None]:
        """While open, each quantizes the tensor of its first call only, and gives the result to all other calls.

        For weights, which stay the same while the gradients of several batches add up. On leaving, the sum of the
        gradients passes through the quantization, once.
        """
        for q in quantizers:
            q._holding = True
        try:
            yield
            held = [q._held for q in quantizers if q._held is not None and q._held[1].grad is not None]
            torch.autograd.backward([out for out, _ in held], [leaf.grad for _, leaf in held])
        finally:
            for q in quantizers:
                q._holding, q._held = False, None

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """While open, calls pass x on unchanged and average its scalars into `s`, from scratch.

        If there is no call, all is as before.
        """
        before = self._batches
        self._batches = 0
        self._calibrating = True
        try:
            yield
        finally:
            self._calibrating = False
            self._batches = self._batches or before
            self.batches.fill_(self._batches)

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
        saved_bits = int(state_dict.get(f"{prefix}grid", self.grid)[0])
        if saved_bits != self.bits:
            error_msgs.append(f"{prefix}grid: scalars found for {saved_bits} bits do not suit {self.bits} bits")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._batches = int(self.batches)
        self.decide_sign(bool(self.grid[1]))
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
        when = "dynamic" if self.dynamic else "static"
        sign = ("signed" if self.signed else "unsigned") if self.decided else "sign open"
        return (
            f"bits={self.bits}, {sign}, per {self.granularity}, {when} {self.clipping_name}, gradient={self.gradient}"
        )


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
