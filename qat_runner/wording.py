"""Formatting of numbers, and suggestions for misspelled words."""

import difflib
from collections.abc import Collection


def digits(x: float, count: int = 3) -> str:
    """Format a number to `count` significant digits, without an exponent if it is large: 0.0123, 12.3, 1340."""
    text = f"{x:.{count}g}"
    return f"{x:.0f}" if "e+" in text else text


def percent(share: float, count: int = 2) -> str:
    """Format a share, 0 to 1, in percent to `count` significant digits. Only a share of 1 is shown as 100."""
    text = digits(100 * share, count)
    if share < 1 and text == "100":
        text = f"{min(100 * share, 99.99):.2f}"
    return f"{text} %"


def closest(word: str, known: Collection[str]) -> str | None:
    """Return the known word that an unknown one is probably meant to be, or None. Swapped letters are the likeliest
    mistake: of close words, one with the same letters comes first."""
    close = difflib.get_close_matches(word, known)
    return min(close, key=lambda candidate: sorted(candidate) != sorted(word), default=None)


def meant(word: str, known: Collection[str]) -> str:
    """Return the end of an error message about an unknown word: the closest known word as a suggestion, if there is
    one."""
    close = closest(word, known)
    return f"; did you mean {close}?" if close else ""


def one_of(word: object, allowed: Collection[str]) -> str:
    """Return the end of an error message about a word that is not allowed: the allowed ones, and the closest of
    them."""
    return f"must be one of {', '.join(allowed)}{meant(str(word), allowed)}"
