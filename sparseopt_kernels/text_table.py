"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns, and a rule below the first row, the header.

    Args:
        rows: the cells, the same number in each row. The first column is aligned to the left, all others to
            the right.

    Raises:
        ValueError: the rows have different lengths.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [header, "-" * len(header), *body]
