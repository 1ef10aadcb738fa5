"""Text tables, for a library that needs nothing but PyTorch."""

from collections.abc import Sequence


def columns(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a line of dashes below its header, laid out as by tabulate: numbers right-aligned, text left.

    Args:
        headers: one per column.
        rows: one value per column each; floats are shown with four significant digits. A column is numeric if all of
            its values are numbers; True and False are not.
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
