"""The map of `make bench`: the speed-up of SparseOpt over a rival, by size and sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comparison import COLD, OURS
from cpu_results import Row, caption, timed

from sparseopt_kernels.lab.training import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By the title of the panel: the rival, and its substitute where it is wrong.
_RIVALS = {
    "fused SGD (no mask)": ("sgd fused, no mask", "sgd foreach, no mask"),
    "tuned eager chain": ("eager chain, tuned", "eager chain, tuned (sgd foreach)"),
}
_SIDE = 4.0  # the ratio, either way, at which the colour scale ends


def png(rows: Sequence[Row]) -> bytes | None:
    """Draw rows of one machine and instruction set as a PNG file; return None if there are no rows.

    There is a panel for each network, state of the caches and rival; a frame marks its smallest value, an
    asterisk a substitute.
    """
    right = timed(rows)
    if not right:
        return None
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in right:
        lines.setdefault((row["network"], row["cache"]), []).append(row)
    heights = [len({row["weights"] for row in own}) for own in lines.values()]

    def draw(figure: Figure) -> None:
        figure.suptitle(
            "How many times as fast as a rival's SparseOpt's step is, by size and sparsity",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
        panels = figure.subplots(len(lines), len(_RIVALS), height_ratios=heights, squeeze=False)
        image: Any = None
        for line, ((network, cache), own) in zip(panels, lines.items(), strict=True):
            caches = ", cold caches" if cache == COLD else ""
            for axes, rival in zip(line, _RIVALS, strict=True):
                image = _draw(axes, own, _RIVALS[rival])
                axes.set_title(f"{network}{caches}, against {rival}", loc="left", fontsize=8)
            line[0].set_ylabel("weights (log)")
        for axes in panels[-1]:
            axes.set_xlabel("sparsity (not to scale)")
        ticks = [1 / _SIDE, 0.5, 1.0, 2.0, _SIDE]
        bar = figure.colorbar(
            image, ax=panels, orientation="horizontal", aspect=60, fraction=0.03, pad=0.02, extend="both"
        )
        bar.set_ticks([math.log2(ratio) for ratio in ticks], labels=[f"{ratio:g}" for ratio in ticks])
        bar.set_label(
            "the rival's median time over SparseOpt's (log): above 1 (blue) SparseOpt is faster; "
            "framed: the worst of the panel",
            fontsize=8,
        )
        figure.supxlabel(caption(rows), fontsize=7.5)

    return plots.png(8, 2.2 + 0.26 * sum(heights), draw, {"axes.grid": False})


def ratios_of(rows: Sequence[Row], rival: str) -> dict[tuple[int, float], float]:
    """Return the rival's median divided by SparseOpt's, by weights and sparsity, where both were timed."""
    medians: dict[str, dict[tuple[int, float], float]] = {}
    for row in rows:
        place = int(row["weights"]), float(row["sparsity"])
        medians.setdefault(row["contestant"], {})[place] = float(row["p50_ms"])
    ours, theirs = medians.get(OURS, {}), medians.get(rival, {})
    return {place: theirs[place] / ours[place] for place in ours if place in theirs}


def _draw(axes: Axes, rows: Sequence[Row], rivals: Sequence[str]) -> Any:
    """Draw the ratios to the first of ``rivals`` that was right; return the image, for the colour bar."""
    import numpy as np
    from matplotlib.patches import Rectangle

    rival, *stand_ins = (ratios_of(rows, name) for name in rivals)
    ratios = {place: ratio for found in (*stand_ins, rival) for place, ratio in found.items()}
    sizes = sorted({int(row["weights"]) for row in rows}, reverse=True)
    sparsities = sorted({float(row["sparsity"]) for row in rows})
    cells = np.full((len(sizes), len(sparsities)), np.nan)
    for (weights, sparsity), ratio in ratios.items():
        i, j = sizes.index(weights), sparsities.index(sparsity)
        cells[i, j] = math.log2(ratio)
        pale = abs(cells[i, j]) < 0.6 * math.log2(_SIDE)
        shown = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
        shown += "" if (weights, sparsity) in rival else "*"
        axes.text(j, i, shown, ha="center", va="center", fontsize=7.5, color="black" if pale else "white")
    side = math.log2(_SIDE)
    image = axes.imshow(cells, cmap="RdBu", vmin=-side, vmax=side, aspect="auto")
    if ratios:
        weights, sparsity = min(ratios, key=ratios.__getitem__)
        corner = (sparsities.index(sparsity) - 0.5, sizes.index(weights) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
    axes.set_yticks(range(len(sizes)), [short(weights) for weights in sizes])
    axes.tick_params(length=0)
    return image


def short(weights: int) -> str:
    """Format a number of weights with two digits: ``3.1k``, ``32M``."""
    rounded = float(f"{weights:.2g}")
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if rounded >= unit:
            return f"{rounded / unit:g}{suffix}"
    return f"{rounded:g}"
