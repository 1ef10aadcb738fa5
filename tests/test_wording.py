"""Readable numbers, and suggestions for misspelt words."""

import pytest

from qat_runner.wording import digits, meant, percent


def test_percentages_do_not_round_up_to_100() -> None:
    shares = (1.0, 0.99999, 0.997, 0.994, 0.5, 0.0123, 0.0)
    assert [percent(x) for x in shares] == ["100 %", "99.99 %", "99.70 %", "99 %", "50 %", "1.2 %", "0 %"]
    assert [percent(x, 4) for x in (1.0, 0.99996, 0.98123)] == ["100 %", "99.99 %", "98.12 %"]


@pytest.mark.parametrize(("x", "text"), [(1340.4, "1340"), (999.7, "1000"), (12.345, "12.3"), (0.012345, "0.0123")])
def test_large_numbers_have_no_exponent(x: float, text: str) -> None:
    assert digits(x) == text and digits(-x) == f"-{text}"


def test_the_closest_word_is_suggested() -> None:
    known = ("compare", "methods", "status")
    assert meant("comapre", known) == "; did you mean compare?" and meant("runs/one", known) == ""
    assert meant("modle", ("mode", "model")) == "; did you mean model?"
