"""Formats: what a number looks like, apart from its scale.

A format has levels, in units of a clipping scalar s > 0, which belongs to a tensor or to a channel of it. All that
depends on the levels is asked of the format: rounding to them, codes and back, how much noise rounding makes, the shape
of the scalars, and what a code is called in an exported file. Quantizers, records, charts, export and kernels know no
format by its parameters.

The plain integers, `IntFormat`, in three ranges:

| range           | signed                                                     | unsigned (e.g. after a ReLU)    |
|-----------------|------------------------------------------------------------|---------------------------------|
| twos_complement | D = s 2^(1-B), codes -2^(B-1)..2^(B-1)-1: none lies at +s  | D = s 2^-B, codes 0..2^B-1      |
| full            | D = s / (2^(B-1)-1), codes -s/D..s/D: one at either end    | D = s / (2^B-1), codes 0..2^B-1 |
| oriented        | as two's complement, but D = s 2^(1-B) may be negative     | as full                         |

Codes are round(x/D), clamped. Two's complement is the paper's range (section 2, "Quantizers"). An oriented tensor, or
row of one, has its lowest code, the one without a counterpart, on whichever side its sign of s puts it: at -s, which
is above zero where s is negative. So the code at the end serves the side that needs it, and costs nothing: a sign of
the scale is arithmetic that is there anyway. The range full is PACT's as well.

Affine integers, `IntAffineFormat`, are for tensors that reach further to one side of zero: instead of s they have two
ends, low <= 0 <= high, stacked in one tensor [2, ...], with 2^B codes between them:

    D = (high - low) / (2^B - 1),    z = round(-low / D),    codes round(x/D) + z, clamped to 0..2^B-1

z is the zero point, the code of zero, which is exact; so the ends of the grid, -z D and (2^B - 1 - z) D, may lie up to
half a step beside low and high.

To add a format: a frozen dataclass that derives from `Format` and gives `levels`, `rounding_noise`, `encode` and
`decode`. A kernel for it is a branch in a module of `kernels`; without one, `fake_quantize` below serves all backends.
"""

from __future__ import annotations  # configs are checked by formats, and that must not wait for PyTorch

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
"""The bit-widths that can be quantized to. The paper uses 4 to 8."""

Scalar = TypeVar("Scalar", "Tensor", float)


class Range(StrEnum):
    """Which codes plain integers have, and where they lie: see the module's head."""

    TWOS_COMPLEMENT = "twos_complement"
    FULL = "full"
    ORIENTED = "oriented"


def _compute_dtype(x: Tensor) -> torch.dtype:
    """`tensors.compute_dtype`."""
    from qat_runner.quant.tensors import compute_dtype

    return compute_dtype(x)


def check_bits(bits: object) -> None:
    """Raises:
    ValueError: `bits` is no integer in `BITS`.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits={bits!r}: must be an integer from {BITS.start} to {BITS.stop - 1}")


@dataclass(frozen=True)
class Format(ABC):
    """What a number looks like, apart from its scale.

    Args:
        bits: of information in a code, 2 to 16: there are up to 2^bits levels.
        signed: whether there are levels of both signs. What clips and is clipped are magnitudes, then: |x|, or else
            max(x, 0).

    Raises:
        ValueError: `bits` is no integer in 2..16.
    """

    parts: ClassVar[int] = 1
    """how many clipping scalars a row has: 1, s, or 2, a lower and an upper end, stacked along a first dimension"""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def with_sign(self, signed: bool) -> Self:
        """The same format for tensors of the other kind."""
        return replace(self, signed=signed)

    def with_range(self, range: Range) -> Self:
        """The same format with other codes, where it has a choice.

        Raises:
            ValueError: it has none.
        """
        if range is not Range.TWOS_COMPLEMENT:
            raise ValueError(f"range={range}: is for plain integers, not for {self.name}")
        return self

    @property
    def oriented(self) -> bool:
        """Whether scalars have a sign, which says to which side the levels reach further."""
        return False

    @property
    def name(self) -> str:
        """A word for it, such as int4 or uint4: the name that it was registered by, or else its class has, and bits."""
        word = FORMATS.name_of(type(self)) or type(self).__name__.removesuffix("Format").lower()
        return f"{'' if self.signed else 'u'}{word}{self.bits}"

    def ends(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The clipping interval: its lower and its upper end, shape of a scalar."""
        s = s.abs() if self.oriented else s
        return (-s if self.signed else s.new_zeros(s.shape)), s

    def reach(self, s: Tensor) -> Tensor:
        """How far the levels reach from zero, on the side where they reach further: s itself where it has no sign."""
        return s.abs() if self.oriented else s

    def check_scalars(self, s: Tensor) -> None:
        """Raises:
        ValueError: s are no clipping scalars; half a sentence.
        """
        if not bool((s.isfinite() & ((s >= 0) | self.oriented)).all()):
            raise ValueError("clipping scalars must be finite and not negative")

    @property
    @abstractmethod
    def levels(self) -> Sequence[float]:
        """All values that there are, in units of s, rising."""

    @property
    def spacing(self) -> float:
        """From the last level but one to the last, in the units of `levels`."""
        return self.levels[-1] - self.levels[-2]

    @property
    @abstractmethod
    def rounding_noise(self) -> float:
        """k, such that rounding alone costs k s^2 on average: the model of J(s) (section 2 of the paper)."""

    @abstractmethod
    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        """x, any shape and floating dtype -> codes, integers in the compute dtype; s >= 0, broadcastable to x."""

    @abstractmethod
    def decode(self, codes: Tensor, s: Tensor) -> Tensor:
        """Codes -> the values that they stand for, in the dtype of the codes or of s, whichever is wider."""

    def fake_quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Round x to the levels; the reference of what kernels do, and what there is where none serves.

        Args:
            x: any shape and floating dtype.
            s: >= 0, broadcastable to x. Where s is 0 the result is 0; where it is NaN the result is NaN.

        Returns:
            Shape and dtype of x; no gradient is meant to flow.
        """
        s = s.to(_compute_dtype(x))
        q = self.decode(self.encode(x, s), s)
        return q if q.dtype == x.dtype else q.to(x.dtype)

    @property
    def exported_type(self) -> str | None:
        """The integer type that holds its codes in a file: int4, uint4, int8, ...; None: it cannot be exported."""
        return None


@dataclass(frozen=True)
class StepFormat(Format):
    """A format whose values are integers times a step size D = s / `levels_per_scalar`."""

    @property
    @abstractmethod
    def levels_per_scalar(self) -> int:
        """s / D: how many steps the clipping scalar holds."""

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
        """Bits that a code takes."""
        return self.bits

    def step(self, s: Scalar) -> Scalar:
        """D, in units of s."""
        return s / self.levels_per_scalar

    def decode(self, codes: Tensor, s: Tensor) -> Tensor:
        return codes * self.step(s)

    @property
    def storage_bits(self) -> int | None:
        """Of the smallest integer type that holds its codes: 4, 8 or 16; None: there is none."""
        return next((width for width in (4, 8, 16) if self.code_bits <= width), None)

    @property
    def exported_type(self) -> str | None:
        return None if self.storage_bits is None else f"{'' if self.signed else 'u'}int{self.storage_bits}"


@dataclass(frozen=True)
class IntFormat(StepFormat):
    """Plain integers: see the module's head.

    Args:
        bits: width B of a code, 2 to 16.
        signed: codes of both signs if true, none below zero otherwise.
        range: which codes there are.
    """

    range: Range = Range.TWOS_COMPLEMENT

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "range", Range(self.range))  # a word of a config is as good

    def with_range(self, range: Range) -> Self:
        """As `Format.with_range`."""
        return replace(self, range=Range(range))

    @property
    def oriented(self) -> bool:
        return self.signed and self.range is Range.ORIENTED

    @property
    def closed(self) -> bool:
        """Whether the largest code lies at s itself; otherwise it is one step below."""
        return self.range is Range.FULL or (self.range is Range.ORIENTED and not self.signed)

    @property
    def resolution(self) -> int:
        """Steps from zero to the full scale, a power of two."""
        return 1 << (self.bits - 1 if self.signed else self.bits)

    @property
    def levels_per_scalar(self) -> int:
        """s / D: a power of two, or one less in a closed format."""
        return self.resolution - self.closed

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
        """D^2 / 12 in units of s^2; open: 4^-B / 3, or 4^-B / 12 when unsigned."""
        return 1.0 / (12.0 * self.levels_per_scalar**2)

    def full_scale(self, s: Scalar) -> Scalar:
        """The clipping scalar of the open format of the same step: s itself, or a step above it in a closed one.

        In units of it a step is a power of two: scaling by it is exact, whatever it is.
        """
        return self.step(s) * self.resolution if self.closed else s

    def in_steps(self, x: Tensor, s: Tensor) -> Tensor:
        """x / D, which is what is rounded to a code; always fresh memory, in the compute dtype.

        Works on x over the full scale, whose steps are powers of two: exact scaling, and no step size that underflows.

        Args:
            x: any shape and floating dtype.
            s: >= 0, broadcastable to x. Where s is 0 it is taken for 1.
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
    """Affine integers, which have a zero point: see the module's head. Unsigned, low is 0, and so is the zero point."""

    parts: ClassVar[int] = 2

    @property
    def levels_per_scalar(self) -> int:
        """Steps from the lower end to the upper one."""
        return int(2**self.bits - 1)

    @property
    def lowest(self) -> int:
        return 0

    @property
    def highest(self) -> int:
        return self.levels_per_scalar

    @property
    def levels(self) -> Sequence[float]:
        """In units of the width, from the lower end on."""
        return [code / self.levels_per_scalar for code in range(self.levels_per_scalar + 1)]

    @property
    def rounding_noise(self) -> float:
        """D^2 / 12 in units of the width squared."""
        return 1.0 / (12.0 * self.levels_per_scalar**2)

    @property
    def exported_type(self) -> str | None:
        return None if self.storage_bits is None else f"uint{self.storage_bits}"

    def ends(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s[0], s[1]

    def reach(self, s: Tensor) -> Tensor:
        return (-s[0]).maximum(s[1])

    def check_scalars(self, s: Tensor) -> None:
        if not bool(s.isfinite().all() & (s[0] <= 0).all() & (s[1] >= 0).all()):
            raise ValueError("ends must be finite, the lower one not above zero and the upper one not below")

    def step(self, s: Scalar) -> Scalar:
        """D, of ends [2, ...]: shape of one of them."""
        assert not isinstance(s, float)
        return (s[1] - s[0]) / self.levels_per_scalar

    def zero_point(self, s: Tensor) -> Tensor:
        """z, whole numbers in the dtype of s, shape of an end; 0 where both ends are 0."""
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
        """round(x / D), as far as there are codes."""
        step = self.step(s)
        steps = (x.to(_compute_dtype(x)) / step.where(step != 0, 1.0)).round()
        return steps.maximum(-zero).minimum(self.levels_per_scalar - zero)


@dataclass(frozen=True)
class MidriseFormat(StepFormat):
    """2^B levels, the odd multiples of s / (2^B - 1): there is no zero. DoReFa's weights lie on them.

    Codes are the odd numbers, so they take a bit more than there are bits of information.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.signed:
            raise ValueError("signed=False: levels without a zero lie on both sides of it")

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
        """(2 D)^2 / 12 in units of s^2: levels lie two steps apart."""
        return 1.0 / (3.0 * self.levels_per_scalar**2)

    def encode(self, x: Tensor, s: Tensor) -> Tensor:
        v = x.to(_compute_dtype(x)) / s.where(s != 0, 1.0)
        highest = self.highest
        return 2 * ((v + 1) * (highest / 2)).round().clamp(0, highest) - highest


def as_format(format: Format | int) -> Format:
    """A format as it is; of a number, the signed integers of so many bits.

    Raises:
        ValueError: the number is none in 2..16.
    """
    return format if isinstance(format, Format) else IntFormat(format)


FORMATS: Registry[type[Format]] = Registry(
    "number format",
    "qat_runner.formats",
    {"int": IntFormat, "int_affine": IntAffineFormat},
    valid=lambda kind: isinstance(kind, type) and issubclass(kind, Format),
)
"""By the name that policies and configs have for them; each is made of bits and signed alone."""
