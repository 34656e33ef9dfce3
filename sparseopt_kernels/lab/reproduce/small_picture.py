"""The picture of the experiments ``small`` and ``resnet20``: the gain by each remedy, the gain by Eq. 12
under it, and the share of neurons that die.

Each sparsity has a row of panels, because differences at one sparsity are ten times those at another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

from ..training.paired import FEWEST_PAIRS
from .interval_picture import draw_intervals, legend_of
from .picture_titles import draw_title
from .searched import rate_of
from .small_table import (
    KINDS,
    METHODS,
    MODELS,
    OPTIMIZERS,
    REMEDIES,
    AtBest,
    Comparison,
    Place,
    compared,
    dead_share,
    findings,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"none": "#000000", "clip": "#0072b2", "skip": "#e69f00", "both": "#cc79a7", "alive": "#009e73"}
_MARKERS: dict[str, dict[str, Any]] = {
    "sgd": {"marker": "o", "markerfacecolor": "none"},
    "eq12": {"marker": "x"},
}
_TITLES = (
    "worth to masked SGD\n(remedy - none)",
    "worth to Eq. 12\n(remedy - none)",
    "Eq. 12 adds to SGD\nwith the same remedy",
    "dead neurons\nat the end",
)
_SEARCHED = "each way to train at its best rate"
_GAP = 1.0  # between settings, in lines
_LINE = 0.088  # the height of a line in inches
_FEWEST_LINES = 12.0  # the fewest lines that leave room for the label of a row
_ROW = 0.7  # the height of a row of panels without its lines, in inches


def draw_small(
    figure: Figure, at_best: AtBest, sparsities: Sequence[float], resolution: float, missing: Sequence[str]
) -> None:
    """Draw all comparisons, and the shares of dead neurons.

    Args:
        figure: empty.
        at_best: rows at the best rate by seed, for each place, optimizer and remedy.
        sparsities: from the uppermost row of panels to the lowest; one without rows is left out.
        resolution: one test image, in percentage points.
        missing: sentences on the cases that are not measured yet.
    """
    comparisons = compared(at_best, resolution)
    said = (findings(comparisons, resolution, method) for method in METHODS)
    draw_title(figure, *next(filter(None, said), ["nothing can be compared yet"]), *missing)
    lines = {s: places for s in sparsities if (places := _places_of_lines(at_best, s))}
    if not lines:
        return
    heights = [_ROW + _LINE * max(_FEWEST_LINES, *own.values()) for own in lines.values()]
    figure.set_size_inches(8, 1.9 + sum(heights))
    grid = figure.subplots(len(lines), len(_TITLES), squeeze=False, sharey="row", height_ratios=heights)
    for row, (sparsity, own) in zip(grid, lines.items(), strict=True):
        _draw_row(row, at_best, [c for c in comparisons if c.place.sparsity == sparsity], own)
        row[0].set_ylabel(f"sparsity {sparsity:g}", fontweight="bold")
    for axes, text in zip(grid[0], _TITLES, strict=True):
        axes.set_title(text, loc="left", fontsize=9)
    rates = {rate_of(rows) for rows in at_best.values()}
    _draw_legend(figure, grid.flat, f"learning rate {rates.pop():g}" if len(rates) == 1 else _SEARCHED)


def _places_of_lines(at_best: AtBest, sparsity: float) -> dict[tuple[Place, str], float]:
    """Return the y position of the line of each place and remedy, from top to bottom."""
    there = {(place, remedy) for place, _, remedy in at_best if place.sparsity == sparsity}
    order = [
        (Place(model, method, sparsity), remedy)
        for method, model, remedy in product(METHODS, MODELS, REMEDIES)
        if (Place(model, method, sparsity), remedy) in there
    ]
    lines, y = {}, 0.0
    for _, of_place in groupby(order, key=lambda line: line[0]):
        for line in of_place:
            lines[line], y = y, y + 1.0
        y += _GAP
    return lines


def _draw_row(
    row: Sequence[Axes],
    at_best: AtBest,
    comparisons: Sequence[Comparison],
    lines: Mapping[tuple[Place, str], float],
) -> None:
    """Draw the row of one sparsity: a panel for each kind of comparison, with the same limits, and one for
    dead neurons."""
    *of_kinds, of_dead = row
    for axes, kind in zip(of_kinds, KINDS, strict=True):
        for remedy, (label, *_) in REMEDIES.items():
            own = [c for c in comparisons if (c.kind, c.remedy) == (kind, remedy)]
            points = [(lines[c.place, remedy], c.result) for c in own]
            if points:
                draw_intervals(axes, points, _COLOURS[remedy], label)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("points")
    _same_width(of_kinds)
    for optimizer, (place, remedy) in product(OPTIMIZERS, lines):
        share = 100 * dead_share(at_best, [place], optimizer, remedy)
        if not math.isnan(share):
            y, style = lines[place, remedy], _MARKERS[optimizer]
            of_dead.plot([share], [y], color=_COLOURS[remedy], markersize=4, linestyle="none", **style)
    of_dead.set_xlim(left=-1.0, right=max(5.0, 1.05 * of_dead.get_xlim()[1]))
    of_dead.set_xlabel("%")
    middles: dict[Place, list[float]] = {}
    for (place, _), y in lines.items():
        middles.setdefault(place, []).append(y)
    row[0].set_yticks(
        [(own[0] + own[-1]) / 2 for own in middles.values()],
        [f"{METHODS[place.method].split()[0]}, {MODELS[place.model]}" for place in middles],
        fontsize=8,
    )
    row[0].set_ylim(max(lines.values()) + 1.0, -1.0)
    for (place, _), (after, _) in zip(list(lines), list(lines)[1:], strict=False):
        if place.method != after.method:
            for axes in row:
                axes.axhline(middles[after][0] - (1 + _GAP) / 2, color="#bbbbbb", linewidth=0.8)


def _same_width(panels: Sequence[Axes]) -> None:
    """Set the same x limits in all panels, so that differences can be compared by eye."""
    ends = [end for axes in panels for end in axes.get_xlim() if axes.containers]
    if ends:
        for axes in panels:
            axes.set_xlim(min(ends), max(ends))


def _draw_legend(figure: Figure, panels: Iterable[Axes], rates: str) -> None:
    from matplotlib.lines import Line2D

    handles, labels = legend_of(panels)
    by_label = dict(zip(labels, handles, strict=True))
    shown = [remedy.label for remedy in REMEDIES.values() if remedy.label in by_label]
    dead = [
        Line2D([], [], color="#000000", markersize=4, linestyle="none", **style)
        for style in _MARKERS.values()
    ]
    shown_dead = [f"dead, {label}" for label in OPTIMIZERS.values()]
    figure.legend(
        [*(by_label[label] for label in shown), *dead],
        [*shown, *shown_dead],
        loc="outside lower center",
        ncols=5 if len(shown) < len(REMEDIES) else 4,
        title="colour: the remedy; mean and 95% interval over seeds (a dot alone: fewer than "
        f"{FEWEST_PAIRS}); {rates}",
        title_fontsize=8.5,
    )
