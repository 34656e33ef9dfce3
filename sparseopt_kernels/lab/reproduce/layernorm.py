"""Appendix D: the gradient of a masked layer under layer norm, with the same sparsity for all neurons, and
with neurons of different sparsity, which the paper leaves open.

``gradient_ratio.py`` measures the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import linear_regression, mean
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...text_table import aligned
from ...topology.seeding import generator
from .experiment import Case, Row, Settings
from .gradient_ratio import HIDDEN, SEEDS, SPARSITIES, Norm, data_of, load_images, measure_gradients, theory
from .interval_picture import draw_means
from .picture_titles import draw_title
from .table_text import mean_and_spread, seeds_of, still_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sparsities of the neurons of one layer, equally many of each: densities from 0.4 to 0.025, a factor of 16.
_MIXED = (0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.975)
_AVERAGE = mean(_MIXED)
_OF_EACH = HIDDEN // len(_MIXED)
_NEAR = 0.1  # the largest distance of an exponent from -0.5 or 0 at which the title says so
_NORMS: tuple[tuple[Norm, str, str], ...] = (
    ("batch", "batch norm", "#0072b2"),
    ("layer", "layer norm", "#009e73"),
)


class LayerNorm:
    name = "layernorm"
    source = "Appendix D"
    shows = "layer norm scales all neurons of a layer by one factor, batch norm each by its own"
    columns: ClassVar[dict[str, type]] = {
        "layer": str,
        "norm": str,
        "seed": int,
        "sparsity": float,
        "data": str,
        "ratio": float,
    }
    key = ("layer", "norm", "seed")

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return [
            {"layer": layer, "norm": norm, "seed": seed}
            for layer in ("uniform", "mixed")
            for norm, _, _ in _NORMS
            for seed in SEEDS
        ]

    def seconds(self, case: Case) -> float:
        return 3.0 if case["layer"] == "uniform" else 0.6

    def check(self, settings: Settings) -> None:
        load_images(settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        images = load_images(settings.data_dir)
        inputs, seed = images.pixels.shape[1], case["seed"]
        if case["layer"] == "uniform":
            masks = [_mask(inputs, [s] * HIDDEN, seed) for s in SPARSITIES]
            gradients = measure_gradients(case["norm"], masks, images, seed)
            ratios = {s: gradients.ratio(i) for i, s in enumerate(SPARSITIES)}
        else:
            mask = _mask(inputs, [s for s in _MIXED for _ in range(_OF_EACH)], seed)
            gradients = measure_gradients(case["norm"], [mask], images, seed)
            groups = [slice(i * _OF_EACH, (i + 1) * _OF_EACH) for i in range(len(_MIXED))]
            ratios = {s: gradients.ratio(0, group) for s, group in zip(_MIXED, groups, strict=True)}
        return [{**case, "sparsity": s, "data": images.name, "ratio": r} for s, r in ratios.items()]

    def table(self, rows: Sequence[Row]) -> list[str]:
        lines = [f"mean |gradient|, sparse / dense, over active weights; data: {data_of(rows)}"]
        for layer, sparsities in (("uniform", SPARSITIES), ("mixed", _MIXED)):
            header = ("sparsity", "1/sqrt(1 - s)", *(label for _, label, _ in _NORMS))
            body = [
                (
                    f"{s:g}",
                    f"{theory(s):.3f}",
                    *(mean_and_spread(_ratios(rows, layer, norm, s)) for norm, _, _ in _NORMS),
                )
                for s in sparsities
            ]
            lines += ["", _TITLES[layer], *aligned([header, *body])]
        lines += [
            f"(mean ± standard deviation over {seeds_of(rows)})",
            "",
            "uniform, largest deviation of the mean from 1/sqrt(1 - s): "
            + ", ".join(f"{label} {_deviation(rows, norm)}" for norm, label, _ in _NORMS),
            f"mixed, the common factor 1/sqrt(1 - s_avg) would be {theory(_AVERAGE):.3f}",
            "mixed, exponent p in ratio ~ (1 - s_i)^p (-0.5: each neuron its own factor; 0: one for all): "
            + ", ".join(f"{label} {mean_and_spread(_exponents(rows, norm))}" for norm, label, _ in _NORMS),
            *still_missing(self, rows),
        ]
        return lines

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        exponents = {label: mean(own) for norm, label, _ in _NORMS if (own := _exponents(rows, norm))}
        findings = [_finding(label, exponent) for label, exponent in exponents.items()]
        findings = findings or ["no layer with neurons of several sparsities is measured yet"]
        draw_title(
            figure, *(f"{finding};" for finding in findings[:-1]), findings[-1], *still_missing(self, rows)
        )
        left, right = figure.subplots(1, 2, sharey=True)
        curve = torch.linspace(0.0, 0.975, 300).tolist()
        for axes in (left, right):
            axes.plot(
                [1.0 - s for s in curve],
                [theory(s) for s in curve],
                color="black",
                linestyle="--",
                label="1/√(1 - sᵢ), Eq. 11",
            )
        _draw_ratios(left, rows, "uniform", SPARSITIES)
        _draw_ratios(right, rows, "mixed", _MIXED)
        right.axhline(theory(_AVERAGE), color="black", linestyle=":", label="1/√(1 - s_avg)")
        left.set_title("every neuron has the same sparsity", loc="left")
        slopes = ", ".join(f"{label} {exponent:.2f}" for label, exponent in exponents.items())
        slopes = slopes or "not measured yet"
        right.set_title(
            f"neurons of {len(_MIXED)} sparsities in one layer\npower of 1 - sᵢ: {slopes}", loc="left"
        )
        left.set_ylabel("mean |gradient| of active weights, sparse / dense (log)")
        for axes in (left, right):
            axes.legend(loc="upper left")
            axes.set_xlabel("sparsity sᵢ of the neuron (log of 1 - sᵢ)")
        figure.supxlabel(
            f"MLP 784-{HIDDEN}-10 at initialisation, {data_of(rows)}, mean ± standard deviation over "
            f"{seeds_of(rows)}",
            fontsize=8,
        )


_TITLES = {
    "uniform": "uniform: all neurons of the layer have this sparsity",
    "mixed": f"mixed: {_OF_EACH} neurons of each sparsity in one layer, s_avg = {_AVERAGE:.3f}",
}


def _mask(inputs: int, sparsities: Sequence[float], seed: int) -> Tensor:
    """Return a random mask, ``(neurons, inputs)``, with the given sparsity of each neuron."""
    order = torch.rand(len(sparsities), inputs, generator=generator(seed, 0, 0)).argsort(dim=1)
    fan_in = torch.tensor([round((1.0 - s) * inputs) for s in sparsities])
    return order < fan_in.unsqueeze(1)


def _ratios(rows: Sequence[Row], layer: str, norm: Norm, sparsity: float) -> list[float]:
    wanted = (layer, norm, sparsity)
    return [row["ratio"] for row in rows if (row["layer"], row["norm"], row["sparsity"]) == wanted]


def _deviation(rows: Sequence[Row], norm: Norm) -> str:
    by_sparsity = {s: _ratios(rows, "uniform", norm, s) for s in SPARSITIES}
    found = [abs(mean(own) / theory(s) - 1.0) for s, own in by_sparsity.items() if own]
    return f"{max(found):.1%}" if found else "-"


def _exponents(rows: Sequence[Row], norm: Norm) -> list[float]:
    """Return the slope of log ratio over log density for each seed with several sparsities."""
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        if (row["layer"], row["norm"]) == ("mixed", norm):
            by_seed.setdefault(row["seed"], []).append(row)
    return [
        linear_regression(
            [math.log(1.0 - row["sparsity"]) for row in own], [math.log(row["ratio"]) for row in own]
        ).slope
        for own in by_seed.values()
        if len(own) > 1
    ]


def _finding(label: str, exponent: float) -> str:
    if abs(exponent + 0.5) < _NEAR:
        return f"{label} scales each neuron's gradient by its own sparsity"
    if abs(exponent) < _NEAR:
        return f"{label} scales all gradients of a layer alike"
    return f"{label} scales each neuron's gradient by 1 - sᵢ to the power of {exponent:.2f}"


def _draw_ratios(axes: Axes, rows: Sequence[Row], layer: str, sparsities: Sequence[float]) -> None:
    for norm, label, colour in _NORMS:
        draw_means(
            axes,
            {1.0 - s: _ratios(rows, layer, norm, s) for s in sparsities},
            color=colour,
            label=f"measured, {label}",
            fmt="o" if norm == "batch" else "s",
            capsize=3,
            markersize=5,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = (0.0, 0.5, 0.8, 0.9, 0.95, 0.975)
    axes.set_xticks([1.0 - s for s in shown], [f"{s:g}" for s in shown])
    axes.set_yticks([1, 2, 3, 4, 5, 6, 7], ["1", "2", "3", "4", "5", "6", "7"])
    axes.minorticks_off()
    axes.set_xlim(1.05, 0.023)
