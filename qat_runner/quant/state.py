"""What a quantizer remembers: its clipping scalars, and what it must know of them without waiting for the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from qat_runner.quant import kernels
from qat_runner.quant.formats import Format
from qat_runner.quant.kernels.remembered import Remembered
from qat_runner.quant.tensors import recording

SIGN_OPEN = 0.5
"""In place of a sign in a saved `grid`, of what has seen nothing that would tell it."""

HALF = (torch.float16, torch.bfloat16)

LATER = ("seen", "static")
"""Of the state, what states of old do not tell."""


@dataclass
class _Known:
    """What is known of the state without waiting for the device."""

    signed: bool
    static: bool
    seen: bool
    version: tuple[int, int] = (0, 0)
    """of the state that it is known of"""


class ScalarState(nn.Module):
    """Clipping scalars of a tensor, and what they stem from. The state dict holds

    - `s` and `running_s`: shape `shape`, or [2, *shape] for a format with two ends, never less than float32, also after
      `.half()`;
    - `seen`: [], 1 once there are scalars, 0 before;
    - `static`: [], 1 if static, 0 if dynamic: a quantizer becomes what the state that it loads was;
    - `grid`: [2], bits and sign of the format: the sign is taken over, other bits are refused;
    - `batches`: int64, []: how many calls the scalars stem from;
    - `orientation`, only for a format that is oriented: shape `shape`, the signs, 1 or -1, of `s` and `running_s`,
      which are magnitudes.

    A state dict without any of these keys, such as a full-precision model's, loads without complaint and changes
    nothing; one of before `seen` and `static` leaves the quantizer dynamic or static as it is.

    All but `batches` are floating, so that averaging states (EMA, SWA) averages them: `seen` of an average that began
    before the first scalar is the share of the time in which there were scalars, and what `s` is then divided by. An
    average is static as soon as what it follows is.

    Args:
        format: what values are rounded to.
        shape: of s: () for one scalar, (K, 1, 1, 1) for one per output channel of a convolution weight.
        sign_known: whether the format's sign is settled; otherwise it holds until `decide_sign`.
        static: whether scalars are constants.
    """

    s: Tensor
    running_s: Tensor
    batches: Tensor
    grid: Tensor
    seen: Tensor
    static: Tensor
    orientation: Tensor | None

    def __init__(self, format: Format, shape: Sequence[int] = (), sign_known: bool = True, static: bool = False):
        super().__init__()
        self._format = format
        self.dim = next((d for d, n in enumerate(shape) if n != 1), 0 if shape else None)
        whole = (format.parts, *shape) if format.parts > 1 else tuple(shape)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("s", torch.zeros(whole, dtype=dtype))
        self.register_buffer("running_s", torch.zeros(whole, dtype=dtype))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        oriented = torch.ones(tuple(shape), dtype=dtype) if format.with_sign(True).oriented else None
        self.register_buffer("orientation", oriented)
        self.register_buffer("grid", torch.tensor([format.bits, format.signed], dtype=torch.float32))
        self.register_buffer("seen", torch.zeros((), dtype=dtype))
        self.register_buffer("static", torch.tensor(float(static), dtype=dtype))
        self.decided = sign_known
        self._known = _Known(format.signed, static, False)
        self._known.version = self._version_of_state()
        self.name = "quantizer"
        """What errors call it; insertion puts the tensor's name here."""
        self.granularity = "tensor" if self.dim is None else "channel"
        """What has a scalar; insertion says "expert" where it is that."""

    @property
    def format(self) -> Format:
        """What values are rounded to: the format whose sign the state says."""
        signed = self._now().signed
        if self._format.signed != signed:
            self._format = self._format.with_sign(signed)
        return self._format

    def decide_sign(self, signed: bool) -> None:
        """Settle whether there are levels of both signs."""
        self.decided = True
        self.grid[1] = float(signed)
        self._know(signed=signed)

    @property
    def dynamic(self) -> bool:
        """Whether scalars are solved anew on each call, in training at least."""
        return not self._now().static

    @property
    def has_scalars(self) -> bool:
        """Whether `s` and `running_s` mean anything."""
        return self._now().seen

    @property
    def scalars(self) -> Tensor:
        """`s`, with its sign in a format that is oriented."""
        return self.with_orientation(self.s)

    def with_orientation(self, s: Tensor) -> Tensor:
        """Magnitudes of scalars, shape `shape`, with the signs that the state has for them."""
        if self.orientation is None or not self.format.oriented:
            return s
        return torch.copysign(s, self.orientation)  # an average of states may lie between the signs

    def _point(self, s: Tensor) -> Tensor:
        """Take the signs of scalars over, those of zeros as well; returns their magnitudes."""
        if self.orientation is None or not self.format.oriented:
            return s
        self.orientation.copy_(torch.copysign(torch.ones_like(s), s))
        return s.abs()

    @torch.no_grad()
    def assign(self, s: Tensor, batches: int = 1) -> None:
        """Have these scalars, found elsewhere, such as on calibration batches.

        Args:
            s: in units of x, broadcastable to `shape`.
            batches: how many calls they stem from.

        Raises:
            ValueError: s is NaN or infinite, or negative in a format that is not oriented.
        """
        try:
            self.format.check_scalars(s)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        s = self._point(s)
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

    @torch.no_grad()
    def remember(self, s: Tensor, momentum: float) -> None:
        """Take the scalars of a call over, and into the running average with this weight; nothing waits.

        A batch that is not finite ends a run, but must not spoil the average for whoever goes on from it.
        """
        s = self._point(s)
        kernels.backend(s).remember(s, self._remembered(momentum))
        self._know_scalars()

    def _remembered(self, momentum: float) -> Remembered:
        """The state as kernels take it."""
        own = self._buffers  # which is quicker than attributes
        s, running_s, batches = own["s"], own["running_s"], own["batches"]
        return Remembered(s, running_s, batches, momentum, self._known.seen)  # type: ignore[arg-type]

    def _now(self) -> _Known:
        """What the state says, read from the device only where someone else may have written to it.

        In training that is never asked once there are scalars: what DistributedDataParallel broadcasts at every step
        says nothing new.
        """
        unchanged = (self.training and self._known.seen) or self._known.version == self._version_of_state()
        if not (unchanged or recording()):
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
            self._known.seen = True
        self._known.version = self._version_of_state()

    def _know(self, **what: bool) -> None:
        """Note what the state says now."""
        self._known = replace(self._known, **what, version=self._version_of_state())

    def _version_of_state(self) -> tuple[int, int]:
        """Changes with every write to the state. Whoever writes to it from outside writes to all of its buffers."""
        if recording():
            return self._known.version
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
        if not any(prefix + name in state_dict for name in (*self._buffers, *self._parameters)):
            return  # of a full-precision model
        bits, signed = self._format.bits, self.format.signed
        saved_bits = round(float(state_dict.get(f"{prefix}grid", self.grid)[0]))
        if saved_bits != bits:
            error_msgs.append(f"{prefix}grid: scalars found for {saved_bits} bits do not suit {bits} bits")
            return
        if (f"{prefix}orientation" in state_dict) != (self.orientation is not None):
            error_msgs.append(f"{prefix}orientation: scalars of an oriented range suit no other, nor others it")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, t in self._buffers.items():  # assigned, they have the dtype that they were saved in
            if t is not None and t.dtype in HALF:
                self._buffers[name] = t.float()
        for name in LATER:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
        if f"{prefix}seen" not in state_dict:
            self.seen.copy_(self.batches.clamp(max=1))
        if not self.grid.is_meta and float(self.grid[1]) == SIGN_OPEN:
            self.grid[1] = float(signed)
        else:
            self.decided = True
        self._read()
        self._loaded(prefix, missing_keys)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.decided:
            grid = self.grid.detach().clone()
            grid[1] = SIGN_OPEN
            destination[f"{prefix}grid"] = grid

    def _loaded(self, prefix: str, missing_keys: list[str]) -> None:
        """For a subclass that can do without some of its state: called after loading, with what was missing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept, current = dict(self._buffers), self._known.version == self._version_of_state()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():  # scalars stay in full precision (section 4), also in a half-precision model
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        if current:  # it says what it said, wherever it is now: nobody needs to wait for it
            self._know()
        return self
