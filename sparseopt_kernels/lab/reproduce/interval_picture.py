"""Draws means as dots, with bars for the 95% interval of paired differences or for the standard deviation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from ..training.paired import Paired
from .table_text import spread

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


def draw_intervals(
    axes: Axes,
    points: Iterable[tuple[float, Paired]],
    colour: str,
    label: str,
    *,
    marker: str = "o",
    upright: bool = False,
) -> None:
    """Draw one series of differences.

    Args:
        points: the position and the difference of each. A NaN mean (a run diverged) is left out; a difference
            with too few pairs for an interval is a dot without a bar.
        label: for the legend.
        marker: Matplotlib's name of the marker of the means.
        upright: True if differences are on the y axis and positions on the x axis.
    """
    shown = [(place, result) for place, result in points if not math.isnan(result.mean)]
    places = [place for place, _ in shown]
    means = [result.mean for _, result in shown]
    bars = [0.0 if math.isnan(result.half_width) else result.half_width for _, result in shown]
    axes.errorbar(
        places if upright else means,
        means if upright else places,
        xerr=None if upright else bars,
        yerr=bars if upright else None,
        fmt=marker,
        markersize=3.5,
        capsize=2,
        linewidth=1.2,
        color=colour,
        label=label,
    )


def draw_means(
    axes: Axes, values: Mapping[int, Sequence[float]] | Mapping[float, Sequence[float]], **style: Any
) -> None:
    """Draw the mean and standard deviation of the values at each x position that has values.

    Args:
        values: by x position.
        style: arguments of ``Axes.errorbar``.
    """
    there = {place: own for place, own in values.items() if own}
    if there:
        means, spreads = map(mean, there.values()), map(spread, there.values())
        axes.errorbar(list(there), list(means), list(spreads), **style)


def legend_of(all_axes: Iterable[Axes]) -> tuple[list[Artist], list[str]]:
    """Return the handles and labels of a legend for several panels, each label once."""
    handles: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return list(handles.values()), list(handles)
