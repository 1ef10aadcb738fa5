"""Tests of the library's text tables."""

from hypothesis import given
from hypothesis import strategies as st

from qat_runner.insertion.columns import columns

WORDS = st.text("abc_.", min_size=1, max_size=9)
NUMBERS = st.integers(0, 10**6), st.floats(0, 1e9, width=32)
HEADERS = ("layer", "elements", "mse", "signed")


@given(st.lists(st.tuples(WORDS, *NUMBERS, st.booleans()), min_size=1, max_size=5))
def test_every_value_stands_under_its_head(rows: list[tuple[str, int, float, bool]]) -> None:
    head, dashes, *lines = columns(HEADERS, rows).splitlines()
    assert head.split() == [*HEADERS]
    assert [line.split() for line in lines] == [[layer, f"{n}", f"{mse:.4g}", f"{yes}"] for layer, n, mse, yes in rows]
    ends = [sum(map(len, dashes.split()[: i + 1])) + 2 * i for i in range(4)]
    for line in (head, *lines):
        layer, elements, mse, signed = line.split()
        assert line.startswith(layer)
        assert line[: ends[1]].endswith(elements) and line[: ends[2]].endswith(mse)
        assert line[ends[2] + 2 :] == signed


def test_no_rows() -> None:
    assert columns(("layer", "mse"), []) == "layer    mse\n-------  -----"
