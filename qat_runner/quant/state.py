"""State of a quantizer: its clipping scalars, and facts about them that are known without waiting for the device."""

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
"""Takes the place of the sign in a saved `grid` if the sign is undecided, as before the first batch."""

HALF = (torch.float16, torch.bfloat16)

ADDED_LATER = ("seen", "static")
"""Entries that state dicts of older versions lack."""


@dataclass
class _Known:
    """Copy of parts of the state that can be read without waiting for the device."""

    signed: bool
    static: bool
    seen: bool
    version: tuple[int, int] = (0, 0)
    """version of the state that was copied"""


class ScalarState(nn.Module):
    """Clipping scalars of a tensor, and how they were found.

    The state dict has these entries:

    - `s` and `running_s`: shape `shape`, or [2, *shape] for a format with two clipping bounds; at least float32, also
      after `.half()`;
    - `seen`: [], 1 once there are scalars, 0 before;
    - `static`: [], 1 if static, 0 if dynamic; a quantizer that loads the state becomes static or dynamic accordingly;
    - `grid`: [2], bit-width and sign of the format; on loading, the sign is adopted, and another bit-width is an error;
    - `batches`: int64, [], the number of calls that the scalars were computed from;
    - `orientation`, only for oriented formats: shape `shape`, the signs, 1 or -1, of `s` and `running_s`, which are
      magnitudes.

    Loading a state dict without any of these keys, such as that of a full-precision model, raises no error and changes
    nothing. A state dict from before `seen` and `static` existed leaves the quantizer dynamic or static, as it is.

    All entries except `batches` are floating-point, so that averages of states (EMA, SWA) average them. If an average
    began before the first scalar, its `seen` is the fraction of the time in which there were scalars, and `s` is
    divided by it. An average is static as soon as the state that it follows is.

    Args:
        format: number format to round to.
        shape: shape of s: () for one scalar, (K, 1, 1, 1) for one per output channel of a convolution weight.
        sign_known: whether the sign of the format is decided; otherwise it may change in `decide_sign`.
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
        """Name in error messages; insertion sets it to the name of the tensor."""
        self.granularity = "tensor" if self.dim is None else "channel"
        """The unit that has one scalar: "tensor", "channel", "token" or "expert", which insertion sets."""

    @property
    def format(self) -> Format:
        """Number format to round to, with the sign from the state."""
        signed = self._now().signed
        if self._format.signed != signed:
            self._format = self._format.with_sign(signed)
        return self._format

    def decide_sign(self, signed: bool) -> None:
        """Decide whether there are levels of both signs."""
        self.decided = True
        self.grid[1] = float(signed)
        self._know(signed=signed)

    @property
    def dynamic(self) -> bool:
        """Whether scalars are solved on each call, at least in training."""
        return not self._now().static

    @property
    def has_scalars(self) -> bool:
        """Whether `s` and `running_s` are valid."""
        return self._now().seen

    @property
    def scalars(self) -> Tensor:
        """`s`, with its sign if the format is oriented."""
        return self.with_orientation(self.s)

    def with_orientation(self, s: Tensor) -> Tensor:
        """Return magnitudes of scalars, shape `shape`, with the signs from the state."""
        if self.orientation is None or not self.format.oriented:
            return s
        return torch.copysign(s, self.orientation)  # an average of states may lie between the signs

    def _store_signs(self, s: Tensor) -> Tensor:
        """Store the signs of scalars, including those of zeros, and return their magnitudes."""
        if self.orientation is None or not self.format.oriented:
            return s
        self.orientation.copy_(torch.copysign(torch.ones_like(s), s))
        return s.abs()

    @torch.no_grad()
    def assign(self, s: Tensor, batches: int = 1) -> None:
        """Set the scalars to values found elsewhere, such as on calibration batches.

        Args:
            s: scalars in units of x, broadcastable to `shape`.
            batches: number of calls that they were computed from.

        Raises:
            ValueError: if the format does not allow these scalars: if s is NaN or infinite, or negative in a format
                that is not oriented, or if clipping bounds do not satisfy low <= 0 <= high.
        """
        try:
            self.format.check_scalars(s)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        s = self._store_signs(s)
        self.s.copy_(s)
        self.running_s.copy_(s)
        self.batches.fill_(batches)
        self._know_scalars()

    @torch.no_grad()
    def freeze(self, s: Tensor | None) -> None:
        """Make the quantizer static with these scalars; see `assign`. None: without any; calls then raise an error."""
        if s is not None:
            self.assign(s, max(int(self.batches), 1))
        self.static.fill_(1)
        self._know(static=True)

    @torch.no_grad()
    def remember(self, s: Tensor, momentum: float) -> None:
        """Store the scalars of a call and add them to the running average with weight `momentum`, without waiting.

        A batch that is not finite stops a run, but must not invalidate the average of a run that resumes from it.
        """
        s = self._store_signs(s)
        kernels.backend(s).remember(s, self._remembered(momentum))
        self._know_scalars()

    def _remembered(self, momentum: float) -> Remembered:
        """Return the state in the form that kernels use."""
        own = self._buffers  # faster than attribute access
        s, running_s, batches = own["s"], own["running_s"], own["batches"]
        return Remembered(s, running_s, batches, momentum, self._known.seen)  # type: ignore[arg-type]

    def _now(self) -> _Known:
        """Return `_known`, after updating it from the device if other code may have written to the state.

        In training, the state is not read again once there are scalars: the values that DistributedDataParallel
        broadcasts at every step bring no new information.
        """
        unchanged = (self.training and self._known.seen) or self._known.version == self._version_of_state()
        if not (unchanged or recording()):
            self._read()
        return self._known

    @torch.no_grad()
    def _read(self) -> None:
        """Read the state from its device."""
        if self.seen.is_meta:
            return
        seen = float(self.seen)
        if 0 < seen < 1:  # an average that began before the first scalar
            for t in self._averaged():
                t.div_(seen)
        self._know(signed=round(float(self.grid[1])) > 0, static=float(self.static) > 0, seen=seen > 0)

    def _averaged(self) -> tuple[Tensor, ...]:
        """Return the entries of the state that are zero before the first scalar."""
        return self.s, self.running_s, self.seen

    def _know_scalars(self) -> None:
        """Record, in the state as well, that there are scalars."""
        if not self._known.seen:
            self.seen.fill_(1)
            self._known.seen = True
        self._known.version = self._version_of_state()

    def _know(self, **what: bool) -> None:
        """Update `_known` with the current content of the state."""
        self._known = replace(self._known, **what, version=self._version_of_state())

    def _version_of_state(self) -> tuple[int, int]:
        """Return a key that changes with every write to the state.

        It covers one buffer, since external writes to the state go to all of its buffers.
        """
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
            return  # the state dict of a full-precision model
        bits, signed = self._format.bits, self.format.signed
        saved_bits = round(float(state_dict.get(f"{prefix}grid", self.grid)[0]))
        if saved_bits != bits:
            error_msgs.append(f"{prefix}grid: the saved scalars are for {saved_bits} bits, not for {bits} bits")
            return
        if (f"{prefix}orientation" in state_dict) != (self.orientation is not None):
            error_msgs.append(
                f"{prefix}orientation: scalars of the oriented range cannot be used for another range, or vice versa"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, t in self._buffers.items():  # with assign=True, they have the dtype that they were saved in
            if t is not None and t.dtype in HALF:
                self._buffers[name] = t.float()
        for name in ADDED_LATER:
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
        """Handle missing entries after loading; for subclasses that can work without some of their state."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept, current = dict(self._buffers), self._known.version == self._version_of_state()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():  # scalars stay in full precision (section 4), also in a half-precision model
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        if current:  # the content is the same, so it need not be read again from the new device
            self._know()
        return self
