"""The picture of `make bench`: the time of a step of each contestant, by sparsity, on large layers and on a
small network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comparison import COLD, OURS
from cpu_results import Row, caption, timed

from sparseopt_kernels.lab.training import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By the network's name in the rows.
_PANELS = {
    "4 layers of 4096x2048": "Large layers: 4 of 4096x2048",
    "ResNet-20, 20 steps in a row": "ResNet-20",
}
# Legend, colour and marker by contestant. The colour-blind can tell the colours apart (Okabe and Ito).
_LINES = {
    OURS: ("SparseOpt", "#0072b2", "o"),
    "sgd fused, no mask": ("SGD fused: no mask, no correction", "#777777", "s"),
    "eager chain, tuned": ("eager chain, tuned (float masks, SGD fused)", "#e69f00", "^"),
    "eager chain": ("eager chain (boolean masks, SGD foreach)", "#d55e00", "v"),
    "sgd foreach, no mask": ("SGD foreach: no mask, no correction", "#777777", "x"),
    "eager chain, tuned (sgd foreach)": ("eager chain, tuned (float masks, SGD foreach)", "#e69f00", "<"),
    "torch.compile of the chain": ("torch.compile of the chain", "#cc79a7", "D"),
    "torch.compile of one function": ("torch.compile of one function", "#009e73", "P"),
}


def png(rows: Sequence[Row]) -> bytes | None:
    """Draw rows of one machine and instruction set as a PNG file; return None if no row is of ``_PANELS``.

    Lines are medians, with bands from the 20th to the 80th percentile. Where a network was measured with hot
    and with cold caches, the latter are drawn.
    """
    panels = {network: _shown(rows, network) for network in _PANELS}
    panels = {network: own for network, own in panels.items() if timed(own)}
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        shown: dict[str, Any] = {}
        for axes, (network, own) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            _draw(axes, timed(own))
            axes.set_title(
                f"{_PANELS[network]}\n{int(own[0]['weights']) / 1e6:.3g} million weights"
                + (", cold caches" if own[0]["cache"] == COLD else ""),
                loc="left",
            )
            shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.supylabel("time of a step in ms (log)", fontsize=9)
        figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside upper left",
            ncols=2,
            title="Time of an optimizer step by sparsity: lower is faster",
            title_fontproperties={"weight": "bold", "size": 11},
            alignment="left",
        )
        figure.supxlabel(
            caption([row for own in panels.values() for row in own])
            + "\nfloat32, momentum, weight decay; medians, bands: 20th to 80th percentile",
            fontsize=7.5,
        )

    return plots.png(8, 5.2, draw)


def _shown(rows: Sequence[Row], network: str) -> list[Row]:
    own = [row for row in rows if row["network"] == network]
    return [row for row in own if row["cache"] == COLD] or own


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    sparsities = sorted({float(row["sparsity"]) for row in rows})
    for contestant, (label, colour, marker) in _LINES.items():
        own = sorted(
            (float(row["sparsity"]), *(float(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms")))
            for row in rows
            if row["contestant"] == contestant
        )
        if not own:
            continue
        at, low, median, high = zip(*own, strict=True)
        places = [sparsities.index(sparsity) for sparsity in at]
        ours = contestant == OURS
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            places,
            median,
            label=label,
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=2.2 if ours else 1.3,
            zorder=3 if ours else 2,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
    axes.set_xlabel("sparsity (not to scale)")
