"""The picture of a table of the paper: test accuracy over total training epochs, ours and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Mapping[int, Sequence[float]], Mapping[int, float]]
"""By epochs: the accuracies measured, one for each seed, and the paper's mean, both in per cent."""

# Distinct to the colour-blind too (Okabe and Ito).
_COLOURS = {
    "SparseOpt, HAM": "#009e73",
    "SparseOpt": "#0072b2",
    "SGD, HAM": "#e69f00",
    "SGD": "#d55e00",
    "D alone": "#cc79a7",
    "scalar": "#000000",
}
_DST = {"rigl": "RigL", "set": "SET"}


def draw_table(figure: Figure, title: str, panels: Mapping[tuple[str, float], Mapping[str, Curve]]) -> None:
    """A panel for each DST method and sparsity.

    Args:
        figure: empty.
        title: of the whole.
        panels: by DST method (a row of panels) and sparsity (a column), a curve for each method.
    """
    rows = list(dict.fromkeys(dst for dst, _ in panels))
    columns = list(dict.fromkeys(sparsity for _, sparsity in panels))
    figure.set_size_inches(8, 1.5 + 2.8 * len(rows))
    kinds = "filled: measured here, mean and standard deviation; dashed: the paper"
    figure.suptitle(f"{title}\n{kinds}", fontsize=10)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for (dst, sparsity), curves in panels.items():
        axes = grid[rows.index(dst), columns.index(sparsity)]
        for name, (ours, paper) in curves.items():
            colour = _COLOURS[name]
            axes.plot(list(paper), list(paper.values()), "o--", mfc="none", lw=1, ms=4, color=colour)
            there = {epochs: values for epochs, values in ours.items() if values}
            axes.errorbar(
                list(there),
                [mean(values) for values in there.values()],
                [stdev(values) if len(values) > 1 else 0.0 for values in there.values()],
                fmt="s-",
                ms=5,
                capsize=2,
                color=colour,
                label=name,
            )
        axes.set_title(f"{_DST[dst]}, sparsity {sparsity:.2f}", loc="left")
        axes.set_xticks(list(next(iter(curves.values()))[0]))
        if axes in grid[-1]:
            axes.set_xlabel("training epochs in all")
        if axes in grid[:, 0]:
            axes.set_ylabel("test accuracy in %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
