"""What the options of clipping methods and gradient estimators may be."""

import re
from collections.abc import Callable, Mapping
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


def options_of(chosen: object) -> dict[str, Any]:
    """The options of a method or an estimator, by name."""
    return {field.name: getattr(chosen, field.name) for field in fields(chosen)} if is_dataclass(chosen) else {}


def _declared(kind: object) -> str:
    """The type of a field as it was written, or would be."""
    return kind.__name__ if isinstance(kind, type) else str(kind)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "float": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
}
"""By the word that a field is declared with: whether a value is of that kind, and what it must be."""


def check_options(what: str, kind: type, options: Mapping[str, Any]) -> None:
    """Refuse options that a method or an estimator does not have, or that are not of the kind that is declared:
    numbers, whole numbers, true or false.

    Args:
        what: what a message calls it, such as "clipping 'octav'".
        kind: a dataclass, of whose fields they are.
        options: by name; where there are none, the fields are not looked at, which a compiler could not.

    Raises:
        TypeError: naming an option that there is not.
        ValueError: naming option and value.
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
