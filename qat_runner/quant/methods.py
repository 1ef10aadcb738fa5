"""Clipping methods by name: OCTAV (section 3 of the paper), its competitors (section 5), learned ones (`learned`).

To add a method, write a frozen dataclass that derives from `ClippingMethod`, and register it with
`METHODS.register(name, class)` or in an installed package (see `plugins`).
"""

from __future__ import annotations  # configs are validated against methods, which must not import PyTorch

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
"""Relative change of a scalar below which a training step that starts from the previous scalar stops iterating."""


@dataclass(frozen=True)
class Octav(ClippingMethod):
    """MSE-optimal scalars by Newton-Raphson (Theorem 3.1): `clipping.octav`."""

    name: ClassVar[str] = "octav"
    pools: ClassVar[bool] = True

    iterations: int = 10
    """number of reads of a tensor per solution, when not starting from a previous scalar"""
    warm_iterations: int | None = 6
    """maximum number of reads in a training step that starts from the scalar of the previous step, an excellent start;
    None to never start from a previous scalar, including in evaluation"""
    missing_code: bool = False
    """account for the missing code at +s of two's complement, which the paper neglects"""
    refine: int = 0
    """number of candidates to choose from by measured error, where few elements share a scalar; 0 for none, as in the
    paper"""

    def __post_init__(self) -> None:
        check_iterations(self.iterations)
        check_refine(self.refine)
        if self.warm_iterations is not None and self.warm_iterations < 1:
            raise ValueError(f"warm_iterations={self.warm_iterations}: must be 1 or more")

    @property
    def warm(self) -> bool:  # type: ignore[override]
        """Whether `solve` starts from the previous scalars."""
        return self.warm_iterations is not None

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return clipping scalars; see `ClippingMethod.solve`. In evaluation, they converge from any start."""
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
        """Return the objective of a training step, for plain integers that are not oriented, without refinement.

        See `ClippingMethod.in_training`.
        """
        if not isinstance(format, IntFormat) or format.oriented or self.refine:
            return None
        from qat_runner.quant.kernels.cost import cost_of

        return cost_of(format, self.missing_code, None), *self._reads(warm and self.warm)

    def _reads(self, warm: bool) -> tuple[int, float]:
        """Return the maximum number of reads and the tolerance, for a warm or for a cold start."""
        if warm and self.warm_iterations is not None:
            return self.warm_iterations, WARM_TOLERANCE
        return self.iterations, TOLERANCE


@dataclass(frozen=True)
class Maximum(ClippingMethod):
    """Max-scaling, which clips nothing: `clipping.maximum`."""

    name: ClassVar[str] = "max"
    pools: ClassVar[bool] = True

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return clipping scalars; see `ClippingMethod.solve`."""
        from qat_runner.quant import clipping

        return clipping.maximum(x, format, dim, check=call.check, pool=call.pool)


@dataclass(frozen=True)
class Percentile(ClippingMethod):
    """A percentile of |x|: `clipping.percentile`."""

    name: ClassVar[str] = "percentile"

    q: float = 99.99
    """percentile, above 0 and at most 100, in percent"""

    def __post_init__(self) -> None:
        check_percentile(self.q)

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return clipping scalars; see `ClippingMethod.solve`."""
        from qat_runner.quant import clipping

        return clipping.percentile(x, format, dim, self.q, check=call.check)


@dataclass(frozen=True)
class MseSweep(ClippingMethod):
    """The best of several candidates by measured MSE: `clipping.mse_sweep`."""

    name: ClassVar[str] = "mse_sweep"

    points: int = 100
    """number of candidates, 1 or more"""
    together: bool = True
    """all rows of a weight use the same candidate, as a fraction of their maxima, as in the paper"""

    def __post_init__(self) -> None:
        check_points(self.points)

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return clipping scalars; see `ClippingMethod.solve`."""
        from qat_runner.quant import clipping

        return clipping.mse_sweep(x, format, dim, self.points, together=self.together, check=call.check)

    def token_quantizer(self, format: Format, **how: Any) -> Quantizer:
        """Return a quantizer with one scalar per token, for which `together` is false.

        See `ClippingMethod.token_quantizer`.
        """
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
"""Clipping methods by name."""


def clipping_method(name: str, **options: Any) -> ClippingMethod:
    """Return a clipping method with the given options, after validating them.

    Args:
        name: a name in METHODS.
        **options: fields of the method, e.g. iterations=10, q=99.9.

    Raises:
        ValueError: if there is no such method, or an option is invalid.
        TypeError: if the method does not have an option.
    """
    if name not in METHODS:
        dynamic = str(name).removeprefix("static_")
        hint = meant(str(name), [*METHODS])
        if dynamic != name and dynamic in METHODS:
            hint = f"; for static scalars, set clipping={dynamic!r} and dynamic=False"
        raise ValueError(f"clipping={name!r}: must be one of {', '.join(METHODS)}{hint}")
    kind = METHODS[name]
    check_options(f"clipping {name!r}", kind, options)
    return kind(**options)
