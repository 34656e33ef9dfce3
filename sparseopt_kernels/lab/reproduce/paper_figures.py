"""The figures that the paper prints in its tables 1, 2, 3 and 6 to 9: test accuracy (top-1) in per cent, mean
and, where given, standard deviation. ``tables.py`` measures them here.
"""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table. ``ham`` is "w/ HAM", ``optimizer`` ``"sparseopt"`` ("Ours") or ``"sgd"``
    ("Baseline"), ``epochs`` the total training epochs."""

    dst: str
    sparsity: float
    optimizer: str
    ham: bool
    epochs: int


class Figure(NamedTuple):
    """The figure of a cell. ``std`` is None where the paper gives none (ImageNet)."""

    mean: float
    std: float | None


_TEXT = {
    1: """
epochs                  90 180 270
0.90 rigl sparseopt -   74.41 75.06 75.26
0.90 rigl sgd       -   73.88 74.99 75.26
0.90 set  sparseopt -   74.15 74.81 74.85
0.90 set  sgd       -   73.69 74.83 75.17
0.95 rigl sparseopt -   72.93 73.62 73.95
0.95 rigl sgd       -   72.33 73.36 73.62
0.95 set  sparseopt -   72.59 73.75 73.79
0.95 set  sgd       -   71.84 73.51 73.82
0.97 rigl sparseopt -   71.15 72.65 72.66
0.97 rigl sgd       -   69.94 72.00 72.35
0.97 set  sparseopt -   71.43 72.40 72.73
0.97 set  sgd       -   70.12 72.17 72.65
""",
    2: """
epochs                  100 200 300 500
0.90 rigl sparseopt ham 61.64±0.24 63.37±0.50 64.44±0.55 64.94±0.25
0.90 rigl sparseopt -   61.34±0.35 63.12±0.39 64.30±0.08 65.22±0.40
0.90 rigl sgd       ham 60.80±0.51 62.89±0.13 64.21±0.07 64.89±0.27
0.90 rigl sgd       -   60.66±0.43 62.93±0.17 63.77±0.35 64.66±0.17
0.95 rigl sparseopt ham 57.31±0.54 60.41±0.28 60.91±0.45 62.20±0.38
0.95 rigl sparseopt -   56.80±0.49 59.91±0.45 60.67±0.63 61.74±0.35
0.95 rigl sgd       ham 56.72±0.40 58.76±0.60 60.38±0.23 61.66±0.26
0.95 rigl sgd       -   55.80±0.73 59.22±0.55 60.00±0.54 61.45±0.65
0.97 rigl sparseopt ham 54.06±0.10 56.30±0.28 57.48±0.82 59.13±0.92
0.97 rigl sparseopt -   53.95±0.40 57.01±0.19 57.62±0.59 58.35±0.34
0.97 rigl sgd       ham 52.74±0.69 54.58±0.67 56.45±0.13 57.82±0.76
0.97 rigl sgd       -   52.53±0.35 54.87±0.78 56.50±0.33 57.32±0.16
""",
    3: """
epochs                  100 200 300 500
0.90 set  sparseopt ham 62.04±0.43 63.86±0.20 64.75±0.25 65.20±0.12
0.90 set  sparseopt -   61.97±0.20 63.55±0.17 64.09±0.25 65.21±0.31
0.90 set  sgd       ham 60.99±0.11 63.00±0.44 64.19±0.21 65.07±0.30
0.90 set  sgd       -   60.84±0.50 63.11±0.25 63.99±0.41 65.01±0.37
0.95 set  sparseopt ham 58.33±0.40 60.84±0.25 61.28±0.20 62.69±0.29
0.95 set  sparseopt -   58.04±0.43 60.71±0.28 61.05±0.70 62.46±0.06
0.95 set  sgd       ham 56.87±0.29 59.96±0.26 60.76±0.13 62.09±0.58
0.95 set  sgd       -   56.59±0.17 59.74±0.15 60.77±0.08 61.81±0.36
0.97 set  sparseopt ham 54.60±0.34 57.42±1.15 58.51±0.34 59.30±0.35
0.97 set  sparseopt -   54.76±0.39 56.50±0.06 58.08±0.57 59.43±0.53
0.97 set  sgd       ham 53.70±0.46 56.04±0.30 56.80±0.63 59.16±0.71
0.97 set  sgd       -   53.10±0.48 56.23±0.61 57.09±0.54 59.58±0.46
""",
    6: """
epochs                  90 270
0.90 rigl sparseopt -   69.32 72.61
0.90 rigl sgd       -   66.54 70.97
0.95 rigl sparseopt -   65.86 69.40
0.95 rigl sgd       -   61.39 66.37
0.97 rigl sparseopt -   62.86 67.12
0.97 rigl sgd       -   56.62 62.07
""",
    7: """
epochs                  90 270
0.90 set  sparseopt -   68.53 73.26
0.90 set  sgd       -   65.51 70.61
0.95 set  sparseopt -   65.59 71.16
0.95 set  sgd       -   59.25 65.91
0.97 set  sparseopt -   63.28 68.83
0.97 set  sgd       -   53.39 60.71
""",
    8: """
epochs                  100 200 300 500
0.90 rigl sparseopt ham 59.57±0.50 61.81±0.23 62.98±0.04 63.87±0.24
0.90 rigl sparseopt -   57.96±0.37 60.03±0.14 61.83±0.19 62.24±0.71
0.90 rigl sgd       ham 56.97±0.40 59.30±0.37 60.93±0.11 62.08±0.55
0.90 rigl sgd       -   54.35±1.08 57.20±0.34 58.15±0.39 59.59±0.24
0.95 rigl sparseopt ham 54.25±0.28 57.61±0.27 58.51±0.19 59.83±0.33
0.95 rigl sparseopt -   52.31±0.56 55.29±0.70 56.63±0.52 58.18±0.16
0.95 rigl sgd       ham 50.83±0.35 53.26±0.21 54.20±1.23 55.85±0.26
0.95 rigl sgd       -   46.97±0.47 49.91±0.44 51.64±0.66 53.34±0.17
0.97 rigl sparseopt ham 50.65±0.46 52.82±0.41 54.18±0.44 54.93±0.25
0.97 rigl sparseopt -   48.50±0.23 50.90±0.35 52.24±0.27 53.64±0.43
0.97 rigl sgd       ham 45.29±0.49 48.16±0.19 49.37±0.49 50.06±0.26
0.97 rigl sgd       -   41.01±0.60 44.74±0.36 45.36±0.25 47.11±0.50
""",
    9: """
epochs                  100 200 300 500
0.90 set  sparseopt ham 59.22±0.46 62.05±0.37 62.93±0.11 63.39±0.50
0.90 set  sparseopt -   58.05±0.31 61.28±0.30 61.70±0.44 62.60±0.13
0.90 set  sgd       ham 57.41±0.43 59.61±0.46 60.53±0.31 61.10±0.21
0.90 set  sgd       -   54.43±0.57 57.43±0.25 58.97±0.61 59.95±0.30
0.95 set  sparseopt ham 54.66±0.75 57.50±0.54 59.01±0.59 59.73±0.17
0.95 set  sparseopt -   52.93±0.35 56.21±0.39 56.58±0.47 58.12±0.45
0.95 set  sgd       ham 50.11±0.53 53.06±0.38 54.79±0.28 55.96±0.51
0.95 set  sgd       -   46.67±0.69 50.74±0.23 52.97±0.87 53.29±0.64
0.97 set  sparseopt ham 50.54±0.45 53.47±0.29 54.07±0.12 55.84±0.36
0.97 set  sparseopt -   49.48±0.84 51.71±0.22 53.30±1.26 54.43±0.35
0.97 set  sgd       ham 45.14±0.30 48.14±0.19 48.83±0.77 49.51±0.72
0.97 set  sgd       -   41.41±0.07 44.67±0.62 45.89±0.30 46.65±0.54
""",
}


def _parsed(text: str) -> dict[Cell, Figure]:
    header, *lines = (line.split() for line in text.strip().splitlines())
    cells = {}
    for sparsity, dst, optimizer, ham, *figures in lines:
        for epochs, figure in zip(header[1:], figures, strict=True):
            mean, _, std = figure.partition("±")
            cell = Cell(
                dst=dst, sparsity=float(sparsity), optimizer=optimizer, ham=ham == "ham", epochs=int(epochs)
            )
            cells[cell] = Figure(float(mean), float(std) if std else None)
    return cells


PAPER = {number: _parsed(text) for number, text in _TEXT.items()}
"""The paper's figures, by the number of the table."""
