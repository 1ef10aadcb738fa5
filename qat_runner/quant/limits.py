"""Validation of the options of clipping methods and gradient estimators."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

TOLERANCE = 1e-6
"""Relative change of a scalar below which solving stops, where checking for convergence costs nothing."""


def check_iterations(iterations: int) -> None:
    """Check the number of OCTAV's iterations.

    Raises:
        ValueError: if it is below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: must be at least 1")


def check_refine(candidates: int) -> None:
    """Check the number of candidates for refinement.

    Raises:
        ValueError: if it is negative.
    """
    if candidates < 0:
        raise ValueError(f"refine={candidates}: must be 0 or more candidates")


def check_percentile(q: float) -> None:
    """Check a percentile.

    Raises:
        ValueError: if q is outside (0, 100].
    """
    if not 0 < q <= 100:
        raise ValueError(f"q={q}: a percentile must lie in (0, 100]")


def check_points(points: int) -> None:
    """Check the number of candidates of a sweep.

    Raises:
        ValueError: if it is below 1.
    """
    if points < 1:
        raise ValueError(f"points={points}: must be at least 1")


def options_of(chosen: object) -> dict[str, Any]:
    """Return the options of a method or an estimator, by name."""
    return {field.name: getattr(chosen, field.name) for field in fields(chosen)} if is_dataclass(chosen) else {}


def with_options(name: str, chosen: object, known: Mapping[str, Any] | None = None) -> str:
    """Return the name of a method or an estimator with all options that differ from their defaults, or from the values
    that are `known`: "octav", "percentile(q=99.9)"."""
    usual = {field.name: field.default for field in fields(chosen)} if is_dataclass(chosen) else {}
    usual |= known or {}
    said = [f"{option}={value}" for option, value in options_of(chosen).items() if value != usual[option]]
    return f"{name}({', '.join(said)})" if said else name


def _declared(kind: object) -> str:
    """Return the type of a field as it is, or would be, written in source code."""
    return kind.__name__ if isinstance(kind, type) else str(kind)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
    "float": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
}
"""By the declared type of a field: a check whether a value has this type, and the words for it in error messages."""


def check_options(what: str, kind: type, options: Mapping[str, Any]) -> None:
    """Check that a method or an estimator has these options, and that the values have the declared types.

    Fields declared with a type other than bool, int, float or None are not checked.

    Args:
        what: name for error messages, such as "clipping 'octav'".
        kind: the dataclass whose fields are the options.
        options: values by name. If empty, the fields are not inspected, since a compiler could not do this.

    Raises:
        TypeError: if there is no such option; the message names it.
        ValueError: if a value has the wrong type; the message names option and value.
    """
    if not options:
        return
    known = {field.name: field for field in fields(kind)} if is_dataclass(kind) else {}
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"{what} has no option {name!r}, only {', '.join(known) or 'none'}")
        declared = re.sub(r"(?:typing\.)?Optional\[(.*)\]", r"\1 | None", _declared(known[name].type))
        words = {word.strip() for word in declared.split("|")}
        kinds = [_KINDS[word] for word in _KINDS if word in words]
        if (value is None and "None" in words) or not words <= {*_KINDS, "None"}:
            continue
        if not any(fits(value) for fits, _ in kinds):
            raise ValueError(f"{name}={value!r}: must be {' or '.join(must_be for _, must_be in kinds)}")
