"""The gradient estimators, by name: those of section 4 of the paper, and others, a file each.

| name  | inside the clipping interval                    | outside                             |
|-------|-------------------------------------------------|-------------------------------------|
| ste   | 1                                               | 1                                   |
| pwl   | 1                                               | 0                                   |
| mad   | 1                                               | clip(x) / x                         |
| ewgs  | 1 + delta sign(gradient) (x - Q(x)) / its width | 0                                   |
| trust | 1 within half a step of a level, else 0         | 1 within half a step of it, else 0  |

To add one: a frozen dataclass that derives from `Estimator`, registered with `GRADIENTS.register(name, class)` or by an
installed package (see `plugins`).
"""

from typing import Any

from qat_runner.plugins import Registry
from qat_runner.quant.gradients.estimator import Estimator
from qat_runner.quant.gradients.ewgs import EWGS
from qat_runner.quant.gradients.of_paper import MAD, PWL, STE
from qat_runner.quant.gradients.trust import Trust
from qat_runner.quant.limits import check_options

__all__ = ["GRADIENTS", "Estimator", "gradient_estimator"]

GRADIENTS: Registry[type[Estimator]] = Registry(
    "gradient estimator",
    "qat_runner.gradients",
    {kind.name: kind for kind in (STE, PWL, MAD, EWGS, Trust)},
    valid=lambda kind: isinstance(kind, type) and issubclass(kind, Estimator),
)
"""By name."""


def gradient_estimator(named: str | Estimator, **options: Any) -> Estimator:
    """A gradient estimator with its options, which it checks.

    Args:
        named: a name in GRADIENTS; or an estimator, which is given back.
        **options: its fields, e.g. delta=0.02.

    Raises:
        ValueError: no such estimator, or an option out of range.
        TypeError: an option that the estimator does not have.
    """
    if isinstance(named, Estimator):
        return named
    if named not in GRADIENTS:
        raise ValueError(f"gradient={named!r}: must be one of {', '.join(GRADIENTS)}")
    kind = GRADIENTS[named]
    check_options(f"gradient {named!r}", kind, options)
    return kind(**options)
