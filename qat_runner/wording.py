"""Numbers as people read them, and words as they meant them."""

import difflib
from collections.abc import Sequence


def digits(x: float, count: int = 3) -> str:
    """A number to so many significant digits, never in powers of ten where it is large: 0.0123, 12.3, 1340."""
    told = f"{x:.{count}g}"
    return f"{x:.0f}" if "e+" in told else told


def percent(share: float, count: int = 2) -> str:
    """A share, 0 to 1, in percent: so many significant digits, and 100 for nothing but all."""
    told = digits(100 * share, count)
    if share < 1 and told == "100":
        told = f"{min(100 * share, 99.99):.2f}"
    return f"{told} %"


def meant(word: str, known: Sequence[str]) -> str:
    """The end of a sentence on a word that is none of those that are known: the one that comes closest, if any does."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
