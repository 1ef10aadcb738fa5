"""The uniform grids: B bits and a clipping scalar s > 0.

|        | signed                                       | unsigned (e.g. after a ReLU)      |
|--------|----------------------------------------------|-----------------------------------|
| open   | D = s * 2^(1-B), codes -2^(B-1)..2^(B-1)-1   | D = s * 2^-B, codes 0..2^B-1      |
| closed | D = s / (2^(B-1)-1), codes -s/D..s/D         | D = s / (2^B-1), codes 0..2^B-1   |

Codes are round(x/D), clamped. Open grids are those of the paper (section 2, "Quantizers"): their step is s / 2^(B-1),
not s / (2^(B-1) - 1), so an OCTAV scalar belongs to them and is wrong for the others. On a closed grid, which is
PACT's, the largest code lies at s itself; signed, the lowest one lies at -s.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

BITS = range(2, 17)
"""The bit-widths that can be quantized to. The paper uses 4 to 8."""

Scalar = TypeVar("Scalar", Tensor, float)


@dataclass(frozen=True)
class Grid:
    """A grid without its clipping scalar.

    Args:
        bits: width B of a code, 2 to 16.
        signed: codes of both signs if true, none below zero otherwise.
        closed: the largest code lies at s if true, one step below it otherwise.

    Raises:
        ValueError: `bits` is no integer in 2..16.
    """

    bits: int
    signed: bool = True
    closed: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}: must be an integer from {BITS.start} to {BITS.stop - 1}")

    @property
    def resolution(self) -> int:
        """Steps from zero to the full scale, a power of two."""
        return 1 << (self.bits - 1 if self.signed else self.bits)

    @property
    def levels_per_scalar(self) -> int:
        """s / D: how many steps the clipping scalar holds; a power of two, or one less on a closed grid."""
        return self.resolution - self.closed

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -self.levels_per_scalar if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.resolution - 1

    @property
    def rounding_noise(self) -> float:
        """k, such that rounding alone costs k s^2 = D^2 / 12 on average; open: 4^-B / 3, or 4^-B / 12 when unsigned."""
        return 1.0 / (12.0 * self.levels_per_scalar**2)

    def step(self, s: Scalar) -> Scalar:
        """D, in units of s."""
        return s / self.levels_per_scalar

    def full_scale(self, s: Scalar) -> Scalar:
        """The clipping scalar of the open grid of the same step: s itself, or a step above it on a closed grid.

        In units of it a step is a power of two: scaling by it is exact, whatever it is.
        """
        return self.step(s) * self.resolution if self.closed else s
