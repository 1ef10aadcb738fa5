"""Text tables of a library that needs nothing but PyTorch."""

from collections.abc import Sequence


def columns(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a line of dashes under its head, laid out as tabulate does: numbers to the right, words to the left.

    Args:
        headers: one a column. Fractions are shown with four digits.
        rows: as many values each; a column is of numbers where all of its values are, but for True and False.
    """
    numeric = [rows and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    texts = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max([len(head) + 2, *map(len, cells)]) for head, *cells in zip(headers, *texts, strict=True)]
    lines = [headers, ["-" * width for width in widths], *texts]
    padded = (
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
