"""Figure 2: the gradient of a masked layer against Equation 11, with batch norm and without.

``gradient_ratio.py`` measures the ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ...text_table import aligned
from ...topology.sparsify import sparsify
from .experiment import Case, Row, Settings
from .gradient_ratio import HIDDEN, SEEDS, SPARSITIES, Norm, data_of, load_images, measure_gradients, theory
from .interval_picture import draw_means
from .picture_titles import draw_title
from .table_text import mean_and_spread, seeds_of, still_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NORMS: tuple[tuple[Norm, str, str], ...] = (
    ("batch", "with batch norm", "#0072b2"),
    ("none", "without batch norm", "#d55e00"),
)


class Figure2:
    name = "figure2"
    source = "Figure 2, Sections 3.2 and E.3"
    shows = "batch norm makes the gradient of a sparse layer 1/sqrt(1 - s) times that of the dense one"
    columns: ClassVar[dict[str, type]] = {
        "norm": str,
        "seed": int,
        "sparsity": float,
        "data": str,
        "ratio": float,
    }
    key = ("norm", "seed")

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return [{"norm": norm, "seed": seed} for norm, _, _ in _NORMS for seed in SEEDS]

    def seconds(self, case: Case) -> float:
        return 2.5

    def check(self, settings: Settings) -> None:
        load_images(settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        images = load_images(settings.data_dir)
        masks = [_random_mask(images.pixels.shape[1], s, case["seed"]) for s in SPARSITIES]
        gradients = measure_gradients(case["norm"], masks, images, case["seed"])
        return [
            {**case, "sparsity": s, "data": images.name, "ratio": gradients.ratio(i)}
            for i, s in enumerate(SPARSITIES)
        ]

    def table(self, rows: Sequence[Row]) -> list[str]:
        header = ("sparsity", "1/sqrt(1 - s)", *(label for _, label, _ in _NORMS))
        body = [
            (
                f"{s:g}",
                f"{theory(s):.3f}",
                *(mean_and_spread(_ratios(rows, norm, s)) for norm, _, _ in _NORMS),
            )
            for s in SPARSITIES
        ]
        return [
            f"mean |gradient|, sparse / dense, over active weights; data: {data_of(rows)}",
            *aligned([header, *body]),
            f"(mean ± standard deviation over {seeds_of(rows)})",
            *(
                f"{label}, largest deviation from theory: {_deviation(rows, norm):.1%} of the mean, "
                f"{_deviation_of_a_seed(rows, norm):.1%} of a single seed"
                for norm, label, _ in _measured(rows)
            ),
            *still_missing(self, rows),
        ]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        axes = figure.subplots()
        curve = torch.linspace(0.0, 0.96, 200).tolist()
        axes.plot(
            curve, [theory(s) for s in curve], color="black", linestyle="--", label="theory: 1/√(1 - s)"
        )
        for norm, label, colour in _NORMS:
            draw_means(
                axes,
                {s: _ratios(rows, norm, s) for s in SPARSITIES},
                color=colour,
                label=f"measured, {label}",
                fmt="o" if norm == "batch" else "s",
                capsize=3,
            )
        off = [f"{_deviation(rows, norm):.1%} {label}" for norm, label, _ in _measured(rows)]
        said = f"gradients are off Eq. 11 by at most {', '.join(off)}" if off else "no run is made yet"
        draw_title(figure, said, *still_missing(self, rows))
        axes.set_title(
            f"MLP 784-{HIDDEN}-10 at initialisation, {data_of(rows)}, "
            f"mean ± standard deviation over {seeds_of(rows)}",
            loc="left",
        )
        axes.set_xlabel("sparsity s of the first layer")
        axes.set_ylabel("mean |gradient| of active weights, sparse / dense")
        axes.set_ylim(bottom=0.0)
        axes.legend(loc="upper left")


def _measured(rows: Sequence[Row]) -> list[tuple[Norm, str, str]]:
    return [norm for norm in _NORMS if any(row["norm"] == norm[0] for row in rows)]


def _random_mask(inputs: int, sparsity: float, seed: int) -> Tensor:
    """Return an unstructured random mask, in which neurons differ in fan-in."""
    layer = nn.utils.skip_init(nn.Linear, inputs, HIDDEN, bias=False)  # type: ignore[no-untyped-call]
    return sparsify(layer, sparsity, "uniform", seed=seed)[layer.weight]


def _ratios(rows: Sequence[Row], norm: Norm, sparsity: float) -> list[float]:
    return [row["ratio"] for row in rows if (row["norm"], row["sparsity"]) == (norm, sparsity)]


def _deviation(rows: Sequence[Row], norm: Norm) -> float:
    """Return the largest deviation of the mean over seeds from the theory, as a fraction of it."""
    by_sparsity = {s: _ratios(rows, norm, s) for s in SPARSITIES}
    return max(abs(mean(own) / theory(s) - 1.0) for s, own in by_sparsity.items() if own)


def _deviation_of_a_seed(rows: Sequence[Row], norm: Norm) -> float:
    return max(
        abs(float(row["ratio"]) / theory(row["sparsity"]) - 1.0) for row in rows if row["norm"] == norm
    )
