"""Number formats: the quantization levels of a tensor, up to a scale.

A format defines its levels in units of a clipping scalar s > 0, which belongs to a tensor or to one channel of it.
Everything that depends on the levels is a method or property of the format: rounding to the levels, encoding and
decoding, the amount of rounding noise, the shape of the scalars, and the type of the codes in an exported file.
Quantizers, records, charts, export and kernels do not depend on the parameters of a format.

Plain integers, `IntFormat`, have one of three ranges. B is the bit-width and D the step size:

| range           | signed                                                     | unsigned (e.g. after a ReLU)    |
|-----------------|------------------------------------------------------------|---------------------------------|
| twos_complement | D = s 2^(1-B), codes -2^(B-1)..2^(B-1)-1: none lies at +s  | D = s 2^-B, codes 0..2^B-1      |
| full            | D = s / (2^(B-1)-1), codes -s/D..s/D: one at -s, one at +s | D = s / (2^B-1), codes 0..2^B-1 |
| oriented        | as two's complement, but D = s 2^(1-B) may be negative     | as full                         |

Codes are round(x/D), clamped. Two's complement is the paper's range (section 2, "Quantizers"). In the oriented range,
the lowest code, which has no counterpart of opposite sign, lies at -s. The sign of s is chosen for each tensor or row,
and a negative s puts this code above zero. The extra code thus serves the side that needs it, at no cost: multiplying
by a signed scale takes the same arithmetic. PACT uses the full range, too.

Affine integers, `IntAffineFormat`, are for tensors that are not symmetric around zero. Instead of s they have a lower
and an upper clipping bound, low <= 0 <= high, stacked in one tensor [2, ...], with 2^B codes between them:

    D = (high - low) / (2^B - 1),    z = round(-low / D),    codes round(x/D) + z, clamped to 0..2^B-1

z is the zero point, the code that represents zero exactly. The lowest and highest levels, -z D and (2^B - 1 - z) D,
may therefore differ from low and high by up to half a step.

To add a format, write a frozen dataclass that derives from `Format` and defines `levels`, `rounding_noise`, `encode`
and `decode`. A kernel for it is a branch in a module of `kernels`; without one, all backends use `fake_quantize` below.
"""

from __future__ import annotations  # configs are validated against formats, which must not import PyTorch

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from qat_runner.plugins import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = range(2, 17)
"""The supported bit-widths. The paper uses 4 to 8."""

Scalar = TypeVar("Scalar", "Tensor", float)


class Range(StrEnum):
    """The codes of plain integers, and which values they represent; see the module docstring."""

    TWOS_COMPLEMENT = "twos_complement"
    FULL = "full"
    ORIENTED = "oriented"


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Call `tensors.compute_dtype`, imported late because it needs PyTorch."""
    from qat_runner.quant.tensors import compute_dtype

    return compute_dtype(x)


def check_bits(bits: object) -> None:
    """Check a bit-width.

    Raises:
        ValueError: if `bits` is not an integer in `BITS`.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits={bits!r}: must be an integer from {BITS.start} to {BITS.stop - 1}")


@dataclass(frozen=True)
class Format(ABC):
    """The quantization levels of a number, up to a scale.

    Args:
        bits: bit-width, the bits of information in a code, 2 to 16; there are up to 2^bits levels.
        signed: whether there are levels of both signs. Clipping applies to the magnitudes |x| if there are, and to
            max(x, 0) otherwise.

    Raises:
        ValueError: if `bits` is not an integer in 2..16.
    """

    parts: ClassVar[int] = 1
    """clipping scalars of a row: 1 for s, or 2 for a lower and an upper bound, stacked along a first dimension"""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def with_sign(self, signed: bool) -> Self:
        """Return the same format, signed or unsigned."""
        return replace(self, signed=signed)

    def with_range(self, range: Range) -> Self:
        """Return the same format with another range of codes.

        Raises:
            ValueError: if the format has no such choice.
        """
        if range is not Range.TWOS_COMPLEMENT:
            raise ValueError(f"range={range}: is for plain integers, not for {self.name}")
        return self

    @property
    def oriented(self) -> bool:
        """Whether scalars have a sign, which determines the side on which the levels reach further from zero."""
        return False

    @property
    def name(self) -> str:
        """Short name such as int4 or uint4: the registered name, or one from the class name, and the bit-width."""
        word = FORMATS.name_of(type(self)) or type(self).__name__.removesuffix("Format").lower()
        return f"{'' if self.signed else 'u'}{word}{self.bits}"

    def clipping_bounds(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower and the upper bound of the clipping interval, each in the shape of a scalar."""
        s = s.abs() if self.oriented else s
        return (-s if self.signed else s.new_zeros(s.shape)), s

    def reach(self, s: Tensor) -> Tensor:
        """Return the distance from zero of the clipping bound that is further away: s itself where s has no sign."""
        return s.abs() if self.oriented else s

    def check_scalars(self, s: Tensor) -> None:
        """Check clipping scalars.

        Raises:
            ValueError: if s are not valid clipping scalars; the caller puts a name in front of the message.
        """
        if not bool((s.isfinite() & ((s >= 0) | self.oriented)).all()):
            raise ValueError("clipping scalars must be finite and not negative")

    @property
    @abstractmethod
    def levels(self) -> Sequence[float]:
        """All quantization levels, in units of s, in ascending order."""

    @property
    def spacing(self) -> float:
        """Distance between the two highest levels, in the units of `levels`."""
        return self.levels[-1] - self.levels[-2]

    @property
    @abstractmethod
    def rounding_noise(self) -> float:
        """k in the model J(s), where rounding alone has the expected squared error k s^2 (section 2 of the paper)."""

    @abstractmethod
    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        """Return the codes of x, integers in the compute dtype.

        Args:
            x: any shape and floating dtype.
            s: >= 0, broadcastable to x.
        """

    @abstractmethod
    def decode(self, codes: Tensor, s: Tensor) -> Tensor:
        """Return the values that codes represent, in the dtype of the codes or of s, whichever is wider."""

    def fake_quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Round x to the levels. This is the reference for the kernels, and is used where no kernel applies.

        Args:
            x: any shape and floating dtype.
            s: >= 0, broadcastable to x. Where s is 0 the result is 0; where it is NaN the result is NaN.

        Returns:
            A tensor in the shape and dtype of x. It is not meant to be differentiated.
        """
        s = s.to(_compute_dtype(x))
        q = self.decode(self.encode(x, s), s)
        return q if q.dtype == x.dtype else q.to(x.dtype)

    @property
    def exported_type(self) -> str | None:
        """Integer type that holds the codes in a file: int4, uint4, int8, ...; None if the format has no export."""
        return None


@dataclass(frozen=True)
class StepFormat(Format):
    """A format whose values are integers times a step size D = s / `levels_per_scalar`."""

    @property
    @abstractmethod
    def levels_per_scalar(self) -> int:
        """s / D: the clipping scalar in steps."""

    @property
    @abstractmethod
    def lowest(self) -> int:
        """The smallest code."""

    @property
    @abstractmethod
    def highest(self) -> int:
        """The largest code."""

    @property
    def spacing(self) -> float:
        return 1 / self.levels_per_scalar

    @property
    def code_bits(self) -> int:
        """Bits that are needed to store a code."""
        return self.bits

    def step(self, s: Scalar) -> Scalar:
        """Return the step size D, in the same units as s."""
        return s / self.levels_per_scalar

    def decode(self, codes: Tensor, s: Tensor) -> Tensor:
        return codes * self.step(s)

    @property
    def storage_bits(self) -> int | None:
        """Bits of the smallest integer type that holds the codes: 4, 8 or 16; None if none does."""
        return next((width for width in (4, 8, 16) if self.code_bits <= width), None)

    @property
    def exported_type(self) -> str | None:
        return None if self.storage_bits is None else f"{'' if self.signed else 'u'}int{self.storage_bits}"


@dataclass(frozen=True)
class IntFormat(StepFormat):
    """Plain integers; see the module docstring.

    Args:
        bits: bit-width B of a code, 2 to 16.
        signed: codes of both signs if true, none below zero otherwise.
        range: the range of codes.
    """

    range: Range = Range.TWOS_COMPLEMENT

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "range", Range(self.range))  # strings, as in configs, are accepted

    def with_range(self, range: Range) -> Self:
        """Return the same format with another range of codes."""
        return replace(self, range=Range(range))

    @property
    def oriented(self) -> bool:
        return self.signed and self.range is Range.ORIENTED

    @property
    def has_code_at_s(self) -> bool:
        """Whether the largest code represents s itself; otherwise it lies one step below s."""
        return self.range is Range.FULL or (self.range is Range.ORIENTED and not self.signed)

    @property
    def resolution(self) -> int:
        """Steps from zero to `full_scale`, a power of two."""
        return 1 << (self.bits - 1 if self.signed else self.bits)

    @property
    def levels_per_scalar(self) -> int:
        """s / D: a power of two, or one less than that if there is a code at s."""
        return self.resolution - self.has_code_at_s

    @property
    def lowest(self) -> int:
        return -self.levels_per_scalar if self.signed else 0

    @property
    def highest(self) -> int:
        return self.resolution - 1

    @property
    def levels(self) -> Sequence[float]:
        return [code / self.levels_per_scalar for code in range(self.lowest, self.highest + 1)]

    @property
    def rounding_noise(self) -> float:
        """D^2 / 12 in units of s^2: without a code at s, 4^-B / 3 if signed and 4^-B / 12 if unsigned."""
        return 1.0 / (12.0 * self.levels_per_scalar**2)

    def full_scale(self, s: Scalar) -> Scalar:
        """Return the clipping scalar of the format that has the same step size and no code at its clipping scalar.

        This is s itself, or one step more if there is a code at s. In units of it, a step is a power of two. Scaling
        between these units and steps is therefore exact.
        """
        return self.step(s) * self.resolution if self.has_code_at_s else s

    def in_steps(self, x: Tensor, s: Tensor) -> Tensor:
        """Return x / D, which is then rounded to a code, as a new tensor in the compute dtype.

        Divides x by the full scale, then multiplies by a power of two. The multiplication is exact, and no step size
        can underflow.

        Args:
            x: any shape and floating dtype.
            s: >= 0, broadcastable to x. Where s is 0, 1 is used instead.
        """
        x = x.to(_compute_dtype(x))
        full_scale = self.full_scale(s.to(x.dtype))
        return (x / full_scale.where(full_scale != 0, 1.0)).mul_(self.resolution)

    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        return self.in_steps(x, s).round_().clamp_(self.lowest, self.highest)

    def fake_quantize(self, x: Tensor, s: Tensor) -> Tensor:
        q = self.encode(x, s)
        return q.mul_(1.0 / self.resolution).mul_(self.full_scale(s.to(q.dtype))).to(x.dtype)


@dataclass(frozen=True)
class IntAffineFormat(StepFormat):
    """Affine integers, which have a zero point; see the module docstring. If unsigned, low and the zero point are 0."""

    parts: ClassVar[int] = 2

    @property
    def levels_per_scalar(self) -> int:
        """Steps from the lower to the upper bound."""
        return int(2**self.bits - 1)

    @property
    def lowest(self) -> int:
        return 0

    @property
    def highest(self) -> int:
        return self.levels_per_scalar

    @property
    def levels(self) -> Sequence[float]:
        """All quantization levels, measured from the lower bound, in units of high - low."""
        return [code / self.levels_per_scalar for code in range(self.levels_per_scalar + 1)]

    @property
    def rounding_noise(self) -> float:
        """D^2 / 12 in units of (high - low)^2."""
        return 1.0 / (12.0 * self.levels_per_scalar**2)

    @property
    def exported_type(self) -> str | None:
        return None if self.storage_bits is None else f"uint{self.storage_bits}"

    def clipping_bounds(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s[0], s[1]

    def reach(self, s: Tensor) -> Tensor:
        return (-s[0]).maximum(s[1])

    def check_scalars(self, s: Tensor) -> None:
        if not bool(s.isfinite().all() & (s[0] <= 0).all() & (s[1] >= 0).all()):
            raise ValueError("clipping bounds must be finite, the lower one at most 0 and the upper one at least 0")

    def step(self, s: Scalar) -> Scalar:
        """Return the step size D of bounds [2, ...], in the shape of one of them."""
        assert not isinstance(s, float)
        return (s[1] - s[0]) / self.levels_per_scalar

    def zero_point(self, s: Tensor) -> Tensor:
        """Return the zero points z, integers in the dtype of s and the shape of a bound; 0 where both bounds are 0."""
        step = self.step(s)
        return (-s[0] / step.where(step != 0, 1.0)).round().clamp(0, self.levels_per_scalar)

    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        zero = self.zero_point(s)
        return self._steps(x, s, zero) + zero

    def decode(self, codes: Tensor, s: Tensor) -> Tensor:
        return (codes - self.zero_point(s)) * self.step(s)

    def fake_quantize(self, x: Tensor, s: Tensor) -> Tensor:
        s = s.to(_compute_dtype(x))
        return (self._steps(x, s, self.zero_point(s)) * self.step(s)).to(x.dtype)

    def _steps(self, x: Tensor, s: Tensor, zero: Tensor) -> Tensor:
        """Return round(x / D), clamped to the range of the codes."""
        step = self.step(s)
        steps = (x.to(_compute_dtype(x)) / step.where(step != 0, 1.0)).round()
        return steps.maximum(-zero).minimum(self.levels_per_scalar - zero)


@dataclass(frozen=True)
class MidriseFormat(StepFormat):
    """2^B levels, the odd multiples of s / (2^B - 1), without a zero. DoReFa uses them for weights.

    Codes are odd integers, so storing a code takes one bit more than its B bits of information.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.signed:
            raise ValueError("signed=False: must be True for levels without a zero, which lie on both sides of it")

    @property
    def levels_per_scalar(self) -> int:
        return int(2**self.bits - 1)

    @property
    def lowest(self) -> int:
        return -self.levels_per_scalar

    @property
    def highest(self) -> int:
        return self.levels_per_scalar

    @property
    def spacing(self) -> float:
        return 2 / self.levels_per_scalar

    @property
    def code_bits(self) -> int:
        return self.bits + 1

    @property
    def levels(self) -> Sequence[float]:
        return [code / self.levels_per_scalar for code in range(self.lowest, self.highest + 1, 2)]

    @property
    def rounding_noise(self) -> float:
        """(2 D)^2 / 12 in units of s^2, since levels are two steps apart."""
        return 1.0 / (3.0 * self.levels_per_scalar**2)

    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        v = x.to(_compute_dtype(x)) / s.where(s != 0, 1.0)
        highest = self.highest
        return 2 * ((v + 1) * (highest / 2)).round().clamp(0, highest) - highest


def as_format(format: Format | int) -> Format:
    """Return a format unchanged, and for a number B the format of signed B-bit integers.

    Raises:
        ValueError: if the number is not an integer in 2..16.
    """
    return format if isinstance(format, Format) else IntFormat(format)


FORMATS: Registry[type[Format]] = Registry(
    "number format",
    "qat_runner.formats",
    {"int": IntFormat, "int_affine": IntAffineFormat},
    valid=lambda kind: isinstance(kind, type) and issubclass(kind, Format),
)
"""Formats by their names in policies and configs; each is constructed from `bits` and `signed` alone."""
