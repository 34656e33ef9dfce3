"""The picture of an experiment: learning curves, and the fan-in of the neurons of each layer."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import FinishedRun, Progress
from .config import Config
from .run import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito).
COLOURS = {"by-hand": "#000000", "sgd": "#d55e00", "sparseopt": "#0072b2"}
LABELS = {"by-hand": "SGD (masked by hand)", "sgd": "SGD (masked)", "sparseopt": "SparseOpt"}
ACCURACY_SCALE = "log of the error"  # for the label of the accuracy axis
_GREY = "#999999"
_COLUMNS = 4
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def png(
    width: float, height: float, draw: Callable[[Figure], object], style: Mapping[Any, Any] | None = None
) -> bytes:
    """Return a PNG file of an empty figure on which ``draw`` has drawn.

    Args:
        width, height: of the figure, in inches.
        draw: draws on the figure, with ``STYLE`` in force.
        style: Matplotlib parameters that differ from ``STYLE``.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which has global state and may need a display.
    with mpl.rc_context({**STYLE, **(style or {})}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def curves_png(progress: Progress, config: Config) -> bytes:
    """Return the picture as a PNG file; ``progress`` has at least one row.

    Above are test accuracy and training loss per epoch: the mean over seeds, and a band of one standard
    deviation. Below is a histogram of fan-in for each masked layer, over the neurons of all finished runs,
    before and after training.
    """
    layers = list(progress.finished[0].fan_in) if progress.finished else []
    rows_below = math.ceil(len(layers) / _COLUMNS)
    heights = [3.6, 0.35 + 1.75 * rows_below] if layers else [3.6]

    def draw(figure: Figure) -> None:
        figure.suptitle(_title(config), fontsize=12, fontweight="bold")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.04, squeeze=False)
        _draw_curves(parts[0, 0], progress.rows, config)
        if layers:
            draw_fan_in(parts[1, 0], progress.finished, config, layers, rows_below)

    return png(10, 0.4 + sum(heights), draw)


def _title(config: Config) -> str:
    method = {"static": "static masks", "set": "SET", "rigl": "RigL"}[config.method]
    masks = f"{100 * config.sparsity:g}% sparse ({config.distribution.upper()})"
    return f"{config.data}, {config.model}, {masks}, {method}"


def _draw_curves(figure: Figure, rows: Sequence[Row], config: Config) -> None:
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    draw_accuracy(accuracy_axes, rows, config)
    for name in config.optimizer:
        own = _rows_of(name, rows)
        if not own:
            continue
        _draw_band(
            loss_axes,
            _by_epoch([(row.epoch, math.log10(max(row.train_loss, 1e-12))) for row in own]),
            name,
            LABELS[name],
            log=True,
        )
    seeds = len(config.seeds)
    over = f" (mean ± std over {seeds} seeds)" if seeds > 1 else ""
    accuracy_axes.set_title(f"Test accuracy by epoch{over}", loc="left")
    accuracy_axes.set_ylabel(f"test accuracy in % ({ACCURACY_SCALE})")
    loss_axes.set_title(f"Training loss by epoch{over}", loc="left")
    loss_axes.set_ylabel("training loss (log)")
    loss_axes.set_yscale("log")
    _set_epochs(loss_axes, config)


def draw_accuracy(
    axes: Axes,
    rows: Sequence[Row],
    config: Config,
    labels: Mapping[str, str] = LABELS,
    others: Sequence[Row] = (),
    difference: str = "",
) -> None:
    """Draw test accuracy in per cent by epoch, for each optimizer: the mean over seeds, and a band of one
    standard deviation.

    Args:
        labels: the names of the optimizers in the legend.
        others: rows that are drawn dashed.
        difference: the name of ``others`` in the legend.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    lowest = []
    for dashed, name in product((False, True), config.optimizer):
        own = _rows_of(name, others if dashed else rows)
        if own:
            accuracy = _by_epoch([(row.epoch, 100 * row.test_accuracy) for row in own])
            lowest.append(float(np.min(accuracy[1] - accuracy[2])))
            _draw_band(axes, accuracy, name, "" if dashed else labels[name], dashed=dashed)
    if others:
        axes.plot([], [], color="#666666", linestyle="--", label=difference)
    if lowest:
        # On a linear axis the first epochs would squeeze all later ones into a line.
        axes.set_yscale("function", functions=(_of_accuracy, _accuracy_of))
        axes.set_ylim(max(0.0, min(lowest)), 100)
        axes.yaxis.set_major_locator(FixedLocator([0, 20, 40, 60, 80, 90, 95, 98, 100]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if others:  # no corner of the axes is free for the legend
            axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=2, columnspacing=1.0)
        else:
            axes.legend(loc="lower right")
    _set_epochs(axes, config)


def _of_accuracy(percent: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the position of an accuracy on the axis: minus the logarithm of the error plus 2%, which is
    finite for an error of 0."""
    return -np.log10(102.0 - np.clip(percent, 0.0, 100.0))


def _accuracy_of(place: NDArray[np.float64]) -> NDArray[np.float64]:
    return 102.0 - np.power(10.0, -place)


def _rows_of(name: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.optimizer == name and row.status == "ok"]


def _set_epochs(axes: Axes, config: Config) -> None:
    axes.set_xlabel("epoch")
    axes.set_xlim(1, max(2, config.epochs))
    axes.locator_params(axis="x", integer=True)


def _by_epoch(values: Sequence[tuple[int, float]]) -> tuple[NDArray[np.float64], ...]:
    """Return the epochs, and the mean and standard deviation of the values of each."""
    epochs = sorted({epoch for epoch, _ in values})
    grouped = [[value for e, value in values if e == epoch] for epoch in epochs]
    means = [np.mean(group) for group in grouped]
    spreads = [np.std(group, ddof=1) if len(group) > 1 else 0.0 for group in grouped]
    return np.array(epochs, dtype=float), np.array(means), np.array(spreads)


def _draw_band(
    axes: Axes,
    curve: tuple[NDArray[np.float64], ...],
    name: str,
    label: str,
    *,
    log: bool = False,
    dashed: bool = False,
) -> None:
    """Draw a line and its band; with ``log``, the values are logarithms to base 10."""
    epochs, means, spreads = curve
    middle, low, high = means, means - spreads, means + spreads
    if log:
        middle, low, high = (np.power(10.0, v) for v in (middle, low, high))
    axes.fill_between(epochs, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    marker = "o" if len(epochs) == 1 else None  # a single epoch draws no line
    style = {"linestyle": "--" if dashed else "-", "linewidth": 1.2 if dashed else 1.8, "marker": marker}
    axes.plot(epochs, middle, color=COLOURS[name], label=label, **style)  # type: ignore[arg-type]


def draw_fan_in(
    figure: Figure,
    finished: Sequence[FinishedRun],
    config: Config,
    layers: Sequence[str],
    rows: int,
    labels: Mapping[str, str] = LABELS,
) -> None:
    """Draw a histogram of the fan-in of each of ``layers`` in a grid of ``rows`` rows, over the neurons of
    all finished runs, before and after training. ``labels`` names the optimizers in the legend."""
    figure.suptitle("Fan-in by layer", fontsize=10, x=0.01, ha="left")
    columns = min(_COLUMNS, len(layers))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, layer in zip(grid, layers, strict=False):
        _draw_layer(axes, finished, config, layer, labels)
    for axes in grid[len(layers) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, columnspacing=1.0)
    figure.supylabel("neurons per run", fontsize=9)
    figure.supxlabel("fan-in (active weights of a neuron); the last bar holds all larger ones", fontsize=9)


def _draw_layer(
    axes: Axes, finished: Sequence[FinishedRun], config: Config, layer: str, labels: Mapping[str, str]
) -> None:
    ends = [np.array(run.fan_in[layer]) for run in finished]
    starts = [np.array(run.initial_fan_in[layer]) for run in finished]
    all_fan_in = np.concatenate(ends + starts)
    bins = _bins(all_fan_in)
    _draw_histogram(axes, starts, bins, color=_GREY, label="before training", filled=True)
    for name in config.optimizer:
        own = [np.array(run.fan_in[layer]) for run in finished if run.optimizer == name]
        if own:
            _draw_histogram(axes, own, bins, color=COLOURS[name], label=f"after, {labels[name]}")
    axes.set_title(f"{layer.removesuffix('.weight')} (largest {all_fan_in.max()})", fontsize=8, pad=3)
    axes.tick_params(labelsize=7.5)
    axes.locator_params(nbins=4, integer=True)
    axes.grid(visible=False, axis="x")


def _draw_histogram(
    axes: Axes,
    fan_ins: Sequence[NDArray[np.int64]],
    bins: NDArray[np.float64],
    *,
    color: str,
    label: str,
    filled: bool = False,
) -> None:
    counts, _ = np.histogram(np.minimum(np.concatenate(fan_ins), bins[-1] - 0.5), bins)
    axes.stairs(
        counts / len(fan_ins),
        bins,
        color=color,
        label=label,
        fill=filled,
        alpha=0.45 if filled else 1.0,
        linewidth=1.4,
    )


def _bins(fan_in: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the edges of about 20 bins, each with the same number of integers.

    The last bin ends at the 99th percentile, and larger values are counted in it: a few neurons may have many
    times the fan-in of all others.
    """
    low, high = int(fan_in.min()), int(np.quantile(fan_in, 0.99))
    if high - low < 4:  # nearly equal, as in a dense layer: one bar should not fill the axes
        low, high = low - 2, high + 2
    width = max(1, math.ceil((high - low + 1) / 20))
    return np.arange(low, high + width + 1, width, dtype=np.float64) - 0.5
