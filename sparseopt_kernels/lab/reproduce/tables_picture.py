"""The picture of a table of the paper: test accuracy over total training epochs, measured and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from .interval_picture import draw_means, legend_of
from .picture_titles import draw_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Mapping[int, Sequence[float]], Mapping[int, float]]
"""The measured accuracies of all seeds, and the paper's mean, both by epochs and in per cent."""

# Colours that the colour-blind can tell apart (Okabe and Ito), and markers for print in grey.
_STYLES = {
    "SparseOpt, HAM": ("#009e73", "^"),
    "SparseOpt": ("#0072b2", "s"),
    "SGD, HAM": ("#e69f00", "v"),
    "SGD": ("#d55e00", "o"),
    "D alone": ("#cc79a7", "P"),
    "scalar": ("#000000", "X"),
    "SparseOpt, active": ("#56b4e9", "D"),
    "SGD, active": ("#999999", "h"),
}
_BASELINE = "SGD"
_DST = {"rigl": "RigL", "set": "SET"}


def draw_table(
    figure: Figure,
    title: str,
    panels: Mapping[tuple[str, float], Mapping[str, Curve]],
    missing: Sequence[str] = (),
) -> None:
    """Draw a panel for each DST method and sparsity.

    Args:
        figure: an empty figure.
        title: the title; below it is the gain of each method over masked SGD.
        panels: by DST method (a row of panels) and sparsity (a column), a curve for each method, the same
            methods in all panels.
        missing: sentences on the cases that are not measured yet.
    """
    rows = list(dict.fromkeys(dst for dst, _ in panels))
    columns = list(dict.fromkeys(sparsity for _, sparsity in panels))
    figure.set_size_inches(8, 2.2 + 2.8 * len(rows))
    draw_title(figure, f"{title}.", _finding(list(panels.values())), *missing)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for (dst, sparsity), curves in panels.items():
        axes = grid[rows.index(dst), columns.index(sparsity)]
        for name, (ours, paper) in curves.items():
            colour, marker = _STYLES[name]
            if not name.endswith("active"):  # the same curve again
                axes.plot(
                    list(paper), list(paper.values()), marker + "--", mfc="none", lw=1, ms=4, color=colour
                )
            draw_means(axes, ours, fmt=marker + "-", ms=5, capsize=2, color=colour, label=name)
        axes.set_title(f"{_DST[dst]}, sparsity {sparsity:.2f}", loc="left")
        axes.set_xticks(list(next(iter(curves.values()))[0]))
        if axes in grid[-1]:
            axes.set_xlabel("training epochs in all")
        if axes in grid[:, 0]:
            axes.set_ylabel("test accuracy in %")
    figure.legend(
        *legend_of(grid.flat),
        loc="outside lower center",
        ncols=6,
        title="filled: measured here, mean ± standard deviation over seeds; hollow, dashed: the paper",
        title_fontsize=8,
    )


def _finding(panels: Sequence[Mapping[str, Curve]]) -> str:
    """Return a sentence on the gain of each method over masked SGD, here and in the paper, where both are
    measured."""
    found = []
    for name in (name for name in panels[0] if name != _BASELINE):
        here, paper = [], []
        for curves in panels:
            (ours, of_paper), (base, base_of_paper) = curves[name], curves[_BASELINE]
            for epochs in [epochs for epochs, values in ours.items() if values and base.get(epochs)]:
                here.append(mean(ours[epochs]) - mean(base[epochs]))
                if epochs in of_paper and epochs in base_of_paper:
                    paper.append(of_paper[epochs] - base_of_paper[epochs])
        if here:
            found.append(f"{name} {mean(here):+.1f}" + (f" ({mean(paper):+.1f})" if paper else ""))
    if not found:
        return f"Nothing is measured yet that can be compared with {_BASELINE}"
    return f"Points above {_BASELINE} here (in the paper): {', '.join(found)}"
