"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines with columns of equal width, and a rule below the first of them, the header.

    Args:
        rows: as many cells in each. Those of the first column are aligned to the left, all others to the
            right.

    Raises:
        ValueError: rows of different lengths.
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
