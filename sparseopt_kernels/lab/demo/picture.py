"""The picture of the demo: accuracy by epoch, the time of a step, the fan-in of the neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..machine import machine
from ..training.checkpoint import Progress
from ..training.config import Config
from ..training.plots import ACCURACY_SCALE, COLOURS, draw_accuracy, draw_fan_in, png
from ..training.run import Row
from .conclusions import NAMES, accuracy_title, names_of, remedy_worth, speed_title, without_remedies
from .step_time import BY_HAND, CORRECTED, DENSE, PLAIN, TUNED, StepTimes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
_COLOURS = {**COLOURS, TUNED: "#666666", DENSE: "#ffffff"}
_ORDER = (BY_HAND, TUNED, DENSE, PLAIN, CORRECTED)


def demo_png(
    progress: Progress, former: Sequence[Row], config: Config, measured: StepTimes, test_examples: int
) -> bytes:
    """Return the picture as a PNG file. At least one run must be finished; ``former`` are the rows without
    clip and skipped step."""
    layers = list(progress.finished[0].fan_in)
    rows_below = math.ceil(len(layers) / _COLUMNS)
    heights = [3.2, 0.35 + 1.6 * rows_below]

    def draw(figure: Figure) -> None:
        parts = figure.subfigures(2, 1, height_ratios=heights, hspace=0.04, squeeze=False)
        above, below = parts[0, 0], parts[1, 0]
        accuracy, times = above.subplots(1, 2)
        draw_accuracy(accuracy, progress.rows, config, NAMES, former, "without clip and skipped step")
        worth = remedy_worth(progress.rows, former, without_remedies(config), test_examples)
        accuracy.set_title(accuracy_title(worth), loc="left")
        accuracy.set_ylabel(f"test accuracy on {config.data} in % ({ACCURACY_SCALE})")
        _draw_times(times, measured)
        draw_fan_in(below, progress.finished, config, layers, rows_below, NAMES)

    return png(8, sum(heights), draw, {"font.size": 8.0, "axes.titlesize": 8.5})


def _draw_times(axes: Axes, measured: StepTimes) -> None:
    """Draw a bar for each contestant up to its median, with the value, and a whisker over the middle 60%."""
    summaries = [measured.times[name] for name in _ORDER]
    medians = [t.p50_ms for t in summaries]
    bars = axes.barh(
        [names_of(measured)[name].replace(", ", ",\n") for name in _ORDER],
        medians,
        xerr=(
            [t.p50_ms - t.p20_ms for t in summaries],
            [t.p80_ms - t.p50_ms for t in summaries],
        ),
        color=[_COLOURS[name] for name in _ORDER],
        edgecolor="#333333",
        error_kw={"elinewidth": 1.0, "capsize": 3, "ecolor": "#999999"},
        height=0.66,
    )
    bars[_ORDER.index(DENSE)].set_hatch("///")  # it does less work than the others
    for bar, t in zip(bars, summaries, strict=True):
        axes.annotate(
            f"{t.p50_ms:.3g} ms",
            (t.p80_ms, bar.get_y() + bar.get_height() / 2),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(t.p80_ms for t in summaries))
    axes.grid(visible=False, axis="y")
    axes.set_title(speed_title(measured), loc="left", x=-0.24)  # it starts above the names of the bars
    axes.set_xlabel(
        f"median time of a step in ms\n{measured.weights / 1e6:.1f} million weights, "
        f"{measured.sparsity:.0%} sparse, {measured.threads} threads\n{machine()}",
        fontsize=7,
    )
