"""Paired differences as they are drawn: a dot for the mean, a bar for the 95% interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..training.paired import Paired

if TYPE_CHECKING:
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
        points: where each is, and what it is; without a number (a run diverged) it is left out, and with too
            few pairs for an interval it is a dot alone.
        label: for the legend.
        marker: of the means, as Matplotlib names it.
        upright: whether differences are on the y axis, and places on the x axis.
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
