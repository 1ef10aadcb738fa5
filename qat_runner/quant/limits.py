"""What the options of clipping methods may be."""

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
