"""The uniform grids of the paper (section 2, "Quantizers"): B bits and a clipping scalar s > 0.

|       | signed (two's complement)                | unsigned (e.g. after a ReLU)     |
|-------|------------------------------------------|----------------------------------|
| step  | D = s * 2^(1-B)                          | D = s * 2^-B                     |
| codes | round(x/D) in [-2^(B-1), 2^(B-1) - 1]    | round(x/D) in [0, 2^B - 1]       |

The step is s / 2^(B-1), not s / (2^(B-1) - 1): an OCTAV scalar belongs to this grid and is wrong for the other.
"""

from dataclasses import dataclass

BITS = range(2, 17)
"""The bit-widths that can be quantized to. The paper uses 4 to 8."""


@dataclass(frozen=True)
class Grid:
    """A grid without its clipping scalar.

    Args:
        bits: width B of a code, 2 to 16.
        signed: two's complement codes if true, unsigned ones otherwise.

    Raises:
        ValueError: `bits` is no integer in 2..16.
    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}: must be an integer from {BITS.start} to {BITS.stop - 1}")

    @property
    def levels_per_scalar(self) -> int:
        """s / D: how many steps the clipping scalar holds, a power of two."""
        return 1 << (self.bits - 1 if self.signed else self.bits)

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -self.levels_per_scalar if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.levels_per_scalar - 1

    @property
    def rounding_noise(self) -> float:
        """k, such that rounding alone costs k * s^2 on average: 4^-B / 3, or 4^-B / 12 when unsigned."""
        return 1.0 / (12.0 * self.levels_per_scalar**2)
