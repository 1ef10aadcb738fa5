"""What the options of clipping methods and gradient estimators may be."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

TOLERANCE = 1e-6
"""Relative change of a scalar at which solving ends, where looking is free."""


def check_iterations(iterations: int) -> None:
    """Raises:
    ValueError: OCTAV reads less than once.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: OCTAV needs at least 1")


def check_refine(candidates: int) -> None:
    """Raises:
    ValueError: fewer than none.
    """
    if candidates < 0:
        raise ValueError(f"refine={candidates}: must be 0 or more candidates")


def check_percentile(q: float) -> None:
    """Raises:
    ValueError: q outside (0, 100].
    """
    if not 0 < q <= 100:
        raise ValueError(f"q={q}: a percentile must lie in (0, 100]")


def check_points(points: int) -> None:
    """Raises:
    ValueError: a sweep without a candidate.
    """
    if points < 1:
        raise ValueError(f"points={points}: a sweep needs at least 1")


def check_numbers(kind: type, options: Mapping[str, Any]) -> None:
    """Refuse what is no number where the default of an option is one, before it is compared with any.

    Raises:
        ValueError: naming option and value.
    """
    for field in fields(kind) if is_dataclass(kind) else ():
        value = options.get(field.name, field.default)
        number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        if value is None and "None" in str(field.type):
            continue
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{field.name}={value!r}: must be a number")
