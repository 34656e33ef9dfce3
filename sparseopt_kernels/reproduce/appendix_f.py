"""What explains the gains of Appendix F? The gradient is limited in norm, over active weights or over all
positions, and each kind of clip is crossed with a factor per neuron (Eq. 12; D, which is ``sqrt(1 - s_i)``)
and with a factor of the same size without any direction, ``sqrt(1 - s_avg)`` of the layer.

A run is in ``pairs.py``: 20,000 steps with weight decay after the clip, for which learning rate times weight
decay times steps is that of the paper's 100 epochs on CIFAR-100, so that the norms of the weights settle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from ..text_table import aligned
from ..training.data import load_dataset
from ..training.paired import Paired, paired
from .experiment import Case, Row, Settings
from .interval_picture import draw_intervals
from .pairs import CLIPS, FACTORS, RESULTS, Parts, Recipe, Training, Way, parts, trained
from .paper_figures import PAPER, Cell
from .searched import Search, Setting, at_rate, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHODS = {"set": "SET", "rigl": "RigL"}
_CLIPS = {"none": "no clip", "active": "clip, active", "dense": "clip, all"}
_LABELS = {"none": "masked SGD", "layer": "Eq. 12", "D": "D", "scalar": "scalar"}
_COLOURS = {"none": "#000000", "layer": "#0072b2", "D": "#d55e00", "scalar": "#009e73"}
_PAPER_TABLES = {"set": (3, 9), "rigl": (2, 8)}  # without renormalisation, with it
_PAPER_EPOCHS = 100
_SECONDS = 55.0  # of one thread of an AMD EPYC that others were using, too


@dataclass(frozen=True)
class AppendixF:
    """The defaults are the experiment; a smaller one can be made for a test."""

    sparsities: tuple[float, ...] = (0.97, 0.95, 0.90)
    searched: tuple[float, ...] = (0.97,)
    """At these sparsities, each way to train is also compared at its best rate of ``rates``."""
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    lr: float = 0.1
    """The paper's, one of ``rates``: all ways to train are compared at it."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    searching: int = 2
    data: str = "fashion-mnist"
    held_out_images: int = 10_000
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=20_000))

    name = "appendixF"
    source = "Appendix F, at a laptop's size"
    shows = (
        "what a clip over all positions costs, and how much of it D and a factor without direction give back"
    )
    columns: ClassVar[Mapping[str, type]] = {
        "method": str,
        "sparsity": float,
        "clip": str,
        "factor": str,
        "lr": float,
        "seed": int,
        **RESULTS,
    }
    key = ("method", "sparsity", "clip", "factor", "lr", "seed")

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """The first sparsity with the paper's rate, then its search for rates, then the other sparsities."""
        cases: list[Case] = []
        for sparsity in self.sparsities:
            settings = self._settings(sparsity)
            cases += [{**setting, "lr": self.lr, "seed": seed} for seed in self.seeds for setting in settings]
            if sparsity in self.searched:
                cases += self._search(sparsity).cases(rows)
        return list({tuple(case.values()): case for case in cases}.values())

    def seconds(self, case: Case) -> float:
        return _SECONDS * self.recipe.steps / 20_000

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        return [{**case, **trained(self._training(case, settings))}]

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        steps = min(steps, self.recipe.steps)
        losses = self._training(case, settings).losses()
        return [float(next(losses)) for _ in range(steps)]

    def table(self, rows: Sequence[Row]) -> list[str]:
        lines = [
            f"test accuracy in %, learning rate {self.lr:g}, and differences in points",
            *self._by_clip(rows),
        ]
        lines += [
            "(the clip limits the norm to 1 over active weights or over all positions; 'costs': masked SGD "
            "under it minus masked SGD without; factors: minus masked SGD under the same clip; ± is the 95% "
            "interval of paired seeds, * beyond it, not corrected for the number of comparisons; the clip's "
            "coefficient, the norms over all positions and over active weights, and the share of dead "
            "neurons are those of masked SGD)",
            "",
            "what is left of the loss of accuracy that the clip over all positions costs masked SGD",
            *self._left(rows),
            "(1: nothing is given back; 'own': each against itself without a clip, where the factor is "
            f"Eq. 12; paper: ResNet-20 on CIFAR-100, {_PAPER_EPOCHS} epochs, no HAM, Tables 2, 3, 8 and 9)",
        ]
        for sparsity in self.searched:
            lines += [
                "",
                f"sparsity {sparsity:g}, each at its best rate (the rate)",
                *self._at_best(rows, sparsity),
            ]
        missing = len(self.cases(rows)) - len(rows)
        if missing:
            lines.append(f"{missing} of {missing + len(rows)} runs that are known of are still to be made")
        return lines

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        figure.set_size_inches(8.6, 6)
        figure.suptitle(self._title(rows), fontsize=10.5, fontweight="bold")
        places = list(product(self.sparsities, CLIPS))
        for axes, (method, name) in zip(
            figure.subplots(1, 2, sharey=True, sharex=True), _METHODS.items(), strict=True
        ):
            for offset, factor in zip((-0.24, -0.08, 0.08, 0.24), FACTORS, strict=True):
                points = []
                for place, (sparsity, clip) in enumerate(places):
                    result = self._difference(
                        rows, (method, sparsity, clip, factor), (method, sparsity, "none", "none")
                    )
                    if result is not None and (clip, factor) != ("none", "none"):
                        points.append((place + offset, result))
                if points:
                    draw_intervals(axes, points, _COLOURS[factor], _LABELS[factor])
            axes.axvline(0, color="black", linewidth=0.8)
            for border in range(len(CLIPS), len(places), len(CLIPS)):
                axes.axhline(border - 0.5, color="#bbbbbb", linewidth=0.8)
            axes.set_yticks(range(len(places)), [f"{s:g}, {_CLIPS[clip]}" for s, clip in places], fontsize=8)
            axes.set_ylim(len(places) - 0.5, -0.5)
            axes.set_title(name, loc="left")
            axes.set_xlabel("test accuracy minus that of masked SGD\nwithout a clip (points)")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=4,
            title=f"95% intervals over seeds, rate {self.lr:g}",
        )

    def _by_clip(self, rows: Sequence[Row]) -> list[tuple[str, ...]] | list[str]:
        header = (
            "",
            "masked SGD",
            "clip costs",
            *(_LABELS[f] for f in ("layer", "D", "scalar")),
            "D - scalar",
        )
        lines: list[tuple[str, ...]] = [(*header, "coefficient", "norm, all", "active", "dead, %")]
        for method, sparsity, clip in product(_METHODS, self.sparsities, CLIPS):
            baseline = self._at(rows, (method, sparsity, clip, "none"))
            if not baseline:
                continue
            place = (method, sparsity, clip)
            compared = [((*place, factor), (*place, "none")) for factor in ("layer", "D", "scalar")]
            compared.append(((*place, "D"), (*place, "scalar")))
            costs = self._difference(rows, (*place, "none"), (method, sparsity, "none", "none"))
            lines.append(
                (
                    f"{_METHODS[method]} {sparsity:g}, {_CLIPS[clip]}",
                    f"{100 * _mean(baseline, 'test_accuracy'):.2f}",
                    "-" if clip == "none" else _shown(costs),
                    *(_shown(self._difference(rows, *pair)) for pair in compared),
                    f"{_mean(baseline, 'clip_coefficient'):.3f}",
                    f"{_mean(baseline, 'norm_all'):.2f}",
                    f"{_mean(baseline, 'norm_active'):.2f}",
                    f"{100 * _mean(baseline, 'dead_share'):.1f}",
                )
            )
        return aligned(lines)

    def _left(self, rows: Sequence[Row]) -> list[str]:
        lines: list[tuple[str, ...]] = [("", "D", "D, own", "scalar", "Eq. 12", "paper", "paper, own")]
        for method, sparsity in product(_METHODS, self.sparsities):
            means = {
                (clip, factor): _mean(own, "test_accuracy")
                for clip, factor in product(CLIPS, FACTORS)
                if (own := self._at(rows, (method, sparsity, clip, factor)))
            }
            lines.append(
                (
                    f"{_METHODS[method]} {sparsity:g}",
                    _share_left(means, "none", "D"),
                    _share_left(means, "layer", "D"),
                    _share_left(means, "none", "scalar"),
                    _share_left(means, "none", "layer"),
                    *_paper_left(method, sparsity),
                )
            )
        return aligned(lines)

    def _at_best(self, rows: Sequence[Row], sparsity: float) -> list[str]:
        best = self._search(sparsity).at_best_rate(rows)
        lines: list[tuple[str, ...]] = [
            (
                "",
                *_LABELS.values(),
                *(f"{_LABELS[f]} - masked SGD" for f in ("layer", "D", "scalar")),
                "clip costs",
            )
        ]
        for method, clip in product(_METHODS, CLIPS):
            own = {factor: best.get((method, sparsity, clip, factor), {}) for factor in FACTORS}
            unclipped = best.get((method, sparsity, "none", "none"), {})
            accuracies = [
                f"{100 * _mean(found, 'test_accuracy'):.2f} ({_lr(found):g})" if found else "-"
                for found in own.values()
            ]
            compared = [_shown(self._paired(own[f], own["none"])) for f in ("layer", "D", "scalar")]
            costs = "-" if clip == "none" else _shown(self._paired(own["none"], unclipped))
            lines.append((f"{_METHODS[method]}, {_CLIPS[clip]}", *accuracies, *compared, costs))
        return aligned(lines)

    def _title(self, rows: Sequence[Row]) -> str:
        words = []
        for method, name in _METHODS.items():
            place = (method, self.sparsities[0], "dense")
            costs = self._difference(rows, (*place, "none"), (*place[:2], "none", "none"))
            back = [self._difference(rows, (*place, f), (*place, "none")) for f in ("D", "scalar")]
            if costs is not None and all(back):
                d, scalar = (f"{result.mean:+.1f}" for result in back if result is not None)
                words.append(
                    f"{name}: masked SGD {costs.mean:+.1f} points, D gives back {d}, a scalar {scalar}"
                )
        about = f"A clip over all positions at sparsity {self.sparsities[0]:g}"
        return "\n".join([about, *words])

    def _difference(
        self, rows: Sequence[Row], ours: tuple[str, float, str, str], baseline: tuple[str, float, str, str]
    ) -> Paired | None:
        """In points of test accuracy, at ``lr``; None if no seed has both."""
        return self._paired(self._at(rows, ours), self._at(rows, baseline))

    def _paired(self, a: Mapping[int, Row], b: Mapping[int, Row]) -> Paired | None:
        if not a.keys() & b.keys():
            return None
        return paired(differences(a, b, "test_accuracy"), 100 / self.recipe.test_pairs)

    def _at(self, rows: Sequence[Row], setting: tuple[str, float, str, str]) -> dict[int, Row]:
        own = (row for row in rows if tuple(row[name] for name in self.key[:4]) == setting)
        return at_rate(own, self.lr)

    def _settings(self, sparsity: float) -> list[Setting]:
        return [
            {"method": method, "sparsity": sparsity, "clip": clip, "factor": factor}
            for method, clip, factor in product(_METHODS, CLIPS, FACTORS)
        ]

    def _search(self, sparsity: float) -> Search:
        return Search(self._settings(sparsity), lambda setting: self.rates, self.seeds, self.searching)

    def _training(self, case: Case, settings: Settings) -> Training:
        return Training(Way(**case), self.recipe, self._parts(settings))

    def _parts(self, settings: Settings) -> Parts:
        return parts(self.data, settings.data_dir, self.held_out_images)


def _share_left(means: Mapping[tuple[str, str], float], unclipped: str, factor: str) -> str:
    """Of what the clip over all positions costs masked SGD, what it costs the factor."""
    needed = [("none", unclipped), ("dense", factor), ("none", "none"), ("dense", "none")]
    if not all(way in means for way in needed):
        return "-"
    without, clipped, sgd, sgd_clipped = (means[way] for way in needed)
    return f"{(without - clipped) / (sgd - sgd_clipped):.2f}" if sgd > sgd_clipped else "-"


def _paper_left(method: str, sparsity: float) -> tuple[str, str]:
    without, clipped = _PAPER_TABLES[method]
    found = {
        (table, optimizer): PAPER[table].get(Cell(method, sparsity, optimizer, False, _PAPER_EPOCHS))
        for table in (without, clipped)
        for optimizer in ("sgd", "sparseopt")
    }
    if not all(found.values()):
        return "-", "-"
    accuracy = {cell: figure.mean for cell, figure in found.items() if figure is not None}
    costs = accuracy[without, "sgd"] - accuracy[clipped, "sgd"]
    left = [
        (accuracy[without, name] - accuracy[clipped, "sparseopt"]) / costs for name in ("sgd", "sparseopt")
    ]
    return f"{left[0]:.2f}", f"{left[1]:.2f}"


def _mean(rows: Mapping[int, Row], column: str) -> float:
    return fmean(row[column] for row in rows.values())


def _lr(rows: Mapping[int, Row]) -> float:
    return float(next(iter(rows.values()))["lr"])


def _shown(result: Paired | None) -> str:
    if result is None:
        return "-"
    spread = "" if math.isnan(result.half_width) else f" ± {result.half_width:.2f}"
    return f"{result.mean:+.2f}{spread}{'*' if result.beyond_noise else ''}"
