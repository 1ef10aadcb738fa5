"""The gradient estimators by name: those of section 4 of the paper, and others in a file each.

The table lists the factor by which each estimator multiplies the gradient:

| name  | inside the clipping interval                    | outside                             |
|-------|-------------------------------------------------|-------------------------------------|
| ste   | 1                                               | 1                                   |
| pwl   | 1                                               | 0                                   |
| mad   | 1                                               | clip(x) / x                         |
| ewgs  | 1 + delta sign(gradient) (x - Q(x)) / L         | 0                                   |
| trust | 1 if abs(x - Q(x)) <= half a step, else 0       | likewise                            |

L is the length of the clipping interval.

To add an estimator, write a frozen dataclass that derives from `Estimator`, and register it with
`GRADIENTS.register(name, class)` or in an installed package (see `plugins`).
"""

from typing import Any

from qat_runner.plugins import Registry
from qat_runner.quant.gradients.estimator import Estimator
from qat_runner.quant.gradients.ewgs import EWGS
from qat_runner.quant.gradients.paper import MAD, PWL, STE
from qat_runner.quant.gradients.trust import Trust
from qat_runner.quant.limits import check_options

__all__ = ["GRADIENTS", "Estimator", "gradient_estimator"]

GRADIENTS: Registry[type[Estimator]] = Registry(
    "gradient estimator",
    "qat_runner.gradients",
    {kind.name: kind for kind in (STE, PWL, MAD, EWGS, Trust)},
    valid=lambda kind: isinstance(kind, type) and issubclass(kind, Estimator),
)
"""Gradient estimators by name."""


def gradient_estimator(named: str | Estimator, **options: Any) -> Estimator:
    """Return a gradient estimator with the given options, after validating them.

    Args:
        named: a name in GRADIENTS; or an estimator, which is returned unchanged.
        **options: fields of the estimator, e.g. delta=0.02.

    Raises:
        ValueError: if there is no such estimator, or an option is invalid.
        TypeError: if the estimator does not have an option.
    """
    if isinstance(named, Estimator):
        return named
    if named not in GRADIENTS:
        raise ValueError(f"gradient={named!r}: must be one of {', '.join(GRADIENTS)}")
    kind = GRADIENTS[named]
    check_options(f"gradient {named!r}", kind, options)
    return kind(**options)
