"""The clipping methods: OCTAV (section 3 of the paper) and its rivals (section 5), learned ones (`learned`), by name.

To add one: a frozen dataclass that derives from `ClippingMethod`, registered with `METHODS.register(name, class)` or by
an installed package (see `plugins`).
"""

from __future__ import annotations  # configs are checked by methods, and that must not wait for PyTorch

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from qat_runner.plugins import Registry, later
from qat_runner.quant.formats import Format, IntFormat
from qat_runner.quant.limits import (
    TOLERANCE,
    check_iterations,
    check_options,
    check_percentile,
    check_points,
    check_refine,
)
from qat_runner.quant.method import Call, ClippingMethod
from qat_runner.wording import meant

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant import Quantizer
    from qat_runner.quant.kernels.cost import Cost

WARM_TOLERANCE = 1e-4
"""Relative change of a scalar at which a training step that starts from the previous one's stops reading."""


@dataclass(frozen=True)
class Octav(ClippingMethod):
    """MSE-optimal scalars by Newton-Raphson (Theorem 3.1): `clipping.octav`."""

    name: ClassVar[str] = "octav"
    pools: ClassVar[bool] = True

    iterations: int = 10
    """reads of a tensor a solution, from cold"""
    warm_iterations: int | None = 6
    """at most so many a training step, from the previous step's scalar, which is an excellent start; None: from cold,
    in evaluation as well"""
    missing_code: bool = False
    """know that two's complement has no code at +s, which the paper neglects"""
    refine: int = 0
    """candidates whose measured error decides, where few elements share a scalar; 0: none, as in the paper"""

    def __post_init__(self) -> None:
        check_iterations(self.iterations)
        check_refine(self.refine)
        if self.warm_iterations is not None and self.warm_iterations < 1:
            raise ValueError(f"warm_iterations={self.warm_iterations}: must be 1 or more")

    @property
    def warm(self) -> bool:  # type: ignore[override]
        """Whether it starts from the previous scalars."""
        return self.warm_iterations is not None

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """As `ClippingMethod.solve`; evaluation converges, whatever it starts from."""
        from qat_runner.quant import clipping

        start = call.start if self.warm else None
        iterations, tolerance = self._reads(start is not None and call.training)
        return clipping.octav(
            x,
            format,
            dim,
            iterations,
            start,
            tolerance=tolerance,
            check=call.check,
            pool=call.pool,
            missing_code=self.missing_code,
            orientation=call.orientation,
            refine=self.refine,
        )

    def in_training(self, format: Format, warm: bool) -> tuple[Cost, int, float] | None:
        """As `ClippingMethod.in_training`: for plain integers that are not oriented, without refining."""
        if not isinstance(format, IntFormat) or format.oriented or self.refine:
            return None
        from qat_runner.quant.kernels.cost import cost_of

        return cost_of(format, self.missing_code, None), *self._reads(warm and self.warm)

    def _reads(self, warm: bool) -> tuple[int, float]:
        """At most so many, and the tolerance, of a step that starts warm, or of another solution."""
        if warm and self.warm_iterations is not None:
            return self.warm_iterations, WARM_TOLERANCE
        return self.iterations, TOLERANCE


@dataclass(frozen=True)
class Maximum(ClippingMethod):
    """Max-scaling, nothing is clipped: `clipping.maximum`."""

    name: ClassVar[str] = "max"
    pools: ClassVar[bool] = True

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """As `ClippingMethod.solve`."""
        from qat_runner.quant import clipping

        return clipping.maximum(x, format, dim, check=call.check, pool=call.pool)


@dataclass(frozen=True)
class Percentile(ClippingMethod):
    """A percentile of |x|: `clipping.percentile`."""

    name: ClassVar[str] = "percentile"

    q: float = 99.99
    """above 0, at most 100, in percent"""

    def __post_init__(self) -> None:
        check_percentile(self.q)

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """As `ClippingMethod.solve`."""
        from qat_runner.quant import clipping

        return clipping.percentile(x, format, dim, self.q, check=call.check)


@dataclass(frozen=True)
class MseSweep(ClippingMethod):
    """The best of some candidates by measured MSE: `clipping.mse_sweep`."""

    name: ClassVar[str] = "mse_sweep"

    points: int = 100
    """candidates, 1 or more"""
    together: bool = True
    """rows of a weight share one candidate, as in the paper"""

    def __post_init__(self) -> None:
        check_points(self.points)

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """As `ClippingMethod.solve`."""
        from qat_runner.quant import clipping

        return clipping.mse_sweep(x, format, dim, self.points, together=self.together, check=call.check)

    def token_quantizer(self, format: Format, **how: Any) -> Quantizer:
        """As `ClippingMethod.token_quantizer`; tokens never share a candidate."""
        return super(MseSweep, replace(self, together=False)).token_quantizer(format, **how)


METHODS: Registry[type[ClippingMethod]] = Registry(
    "clipping method",
    "qat_runner.clipping",
    {
        **{kind.name: kind for kind in (Octav, Maximum, Percentile, MseSweep)},
        "lsq": later("qat_runner.quant.learned:LSQ"),
        "pact": later("qat_runner.quant.learned:PACT"),
    },
    valid=lambda kind: isinstance(kind, type) and issubclass(kind, ClippingMethod),
)
"""By name."""


def clipping_method(name: str, **options: Any) -> ClippingMethod:
    """A clipping method with its options, which it checks.

    Args:
        name: a name in METHODS.
        **options: its fields, e.g. iterations=10, q=99.9.

    Raises:
        ValueError: no such method, or an option out of range.
        TypeError: an option that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"clipping={name!r}: must be one of {', '.join(METHODS)}{meant(str(name), [*METHODS])}")
    kind = METHODS[name]
    check_options(f"clipping {name!r}", kind, options)
    return kind(**options)
