"""The map of `make bench`: how many times as fast as a rival SparseOpt is, by size and sparsity."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comparison import OURS
from cpu_results import Row, caption

from sparseopt_kernels.training.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RIVALS = {"sgd fused, no mask": "SGD fused (no mask)", "eager chain, tuned": "the tuned eager chain"}
_SIDE = 4.0  # times as fast, or as slow: beyond it colours are the same
_CLAIMED_SPARSITY = 0.9


def png(rows: Sequence[Row]) -> bytes | None:
    """A PNG file, drawn of rows of one machine and instruction set; None if there are no rows.

    A panel for each network and rival, its worst cell up to a sparsity of 0.9 in a frame.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        return None
    networks = list(dict.fromkeys(row["network"] for row in rows))
    heights = [len({row["weights"] for row in rows if row["network"] == network}) for network in networks]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(8, 1.9 + 0.26 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(networks), len(_RIVALS), height_ratios=heights, squeeze=False)
        image: Any = None
        for line, network in zip(panels, networks, strict=True):
            own = [row for row in rows if row["network"] == network]
            for axes, rival in zip(line, _RIVALS, strict=True):
                image = _draw(axes, own, rival)
                axes.set_title(f"{network}, against {_RIVALS[rival]}", loc="left", fontsize=9)
            line[0].set_ylabel("weights")
        for axes in panels[-1]:
            axes.set_xlabel("sparsity")
        ticks = [1 / _SIDE, 0.5, 1.0, 2.0, _SIDE]
        bar = figure.colorbar(
            image, ax=panels, orientation="horizontal", aspect=60, fraction=0.03, pad=0.02, extend="both"
        )
        bar.set_ticks([math.log2(ratio) for ratio in ticks], labels=[f"{ratio:g}" for ratio in ticks])
        bar.set_label(
            "how many times as fast as the rival SparseOpt is: above 1 (blue) it is faster; "
            f"framed: the worst up to sparsity {_CLAIMED_SPARSITY}",
            fontsize=8,
        )
        figure.supxlabel(caption(rows), fontsize=7.5)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def ratios_of(rows: Sequence[Row], rival: str) -> dict[tuple[int, float], float]:
    """The median of the rival over that of SparseOpt, by weights and sparsity, where both were timed."""
    medians: dict[str, dict[tuple[int, float], float]] = {}
    for row in rows:
        place = int(row["weights"]), float(row["sparsity"])
        medians.setdefault(row["contestant"], {})[place] = float(row["p50_ms"])
    ours, theirs = medians.get(OURS, {}), medians.get(rival, {})
    return {place: theirs[place] / ours[place] for place in ours if place in theirs}


def _draw(axes: Axes, rows: Sequence[Row], rival: str) -> Any:
    """What a colour bar is made of."""
    import numpy as np
    from matplotlib.patches import Rectangle

    ratios = ratios_of(rows, rival)
    sizes = sorted({int(row["weights"]) for row in rows}, reverse=True)
    sparsities = sorted({float(row["sparsity"]) for row in rows})
    cells = np.full((len(sizes), len(sparsities)), np.nan)
    for (weights, sparsity), ratio in ratios.items():
        i, j = sizes.index(weights), sparsities.index(sparsity)
        cells[i, j] = math.log2(ratio)
        pale = abs(cells[i, j]) < 0.6 * math.log2(_SIDE)
        shown = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
        axes.text(j, i, shown, ha="center", va="center", fontsize=7.5, color="black" if pale else "white")
    side = math.log2(_SIDE)
    image = axes.imshow(cells, cmap="RdBu", vmin=-side, vmax=side, aspect="auto")
    claimed = [place for place in ratios if place[1] <= _CLAIMED_SPARSITY]
    if claimed:
        weights, sparsity = min(claimed, key=ratios.__getitem__)
        corner = (sparsities.index(sparsity) - 0.5, sizes.index(weights) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2))
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
    axes.set_yticks(range(len(sizes)), [short(weights) for weights in sizes])
    axes.tick_params(length=0)
    return image


def short(weights: int) -> str:
    """A number of weights in two digits: ``3.1k``, ``32M``."""
    rounded = float(f"{weights:.2g}")
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if rounded >= unit:
            return f"{rounded / unit:g}{suffix}"
    return f"{rounded:g}"
