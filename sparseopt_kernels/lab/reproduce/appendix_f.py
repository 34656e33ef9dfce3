"""The experiment ``appendixF``: tests explanations for the gains of Appendix F.

Gradient clipping by the norm over active weights or over all positions, and no clipping, are each combined
with a factor per neuron (Eq. 12; D, which is ``sqrt(1 - s_i)``), with the layer's scalar factor
``sqrt(1 - s_avg)``, which keeps the gradient's direction, and with no factor.

``pairs.py`` trains a run. In its 20,000 steps, learning rate times weight decay times steps is that of the
paper's 100 epochs on CIFAR-100, so that the norms of the weights settle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from ...text_table import aligned
from ..training.data import load_dataset
from ..training.paired import FEWEST_PAIRS, Paired, paired
from .experiment import Case, Row, Settings
from .first_steps import UPDATE_EVERY, convert_inputs
from .interval_picture import draw_intervals, legend_of
from .pairs import CLIPS, FACTORS, RESULTS, Parts, Recipe, Training, Way, parts, trained
from .paper_figures import PAPER, Cell
from .picture_titles import draw_title
from .searched import Search, Setting, at_rate, differences, rate_of
from .table_text import fewest_and_most_seeds, signed, star, still_missing, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHODS = {"set": "SET", "rigl": "RigL"}
_CLIPS = {"none": "no clip", "active": "clip over active", "dense": "clip over all"}
_LABELS = {"none": "masked SGD", "layer": "Eq. 12", "D": "D", "scalar": "scalar"}
_COLOURS = {"none": "#000000", "layer": "#0072b2", "D": "#d55e00", "scalar": "#009e73"}
_PAPER_TABLES = {"set": (3, 9), "rigl": (2, 8)}  # without renormalisation, with it
_PAPER_EPOCHS = 100
_FACTORS = ("layer", "D", "scalar")  # compared with masked SGD
_SECONDS = 55.0  # with one thread of a shared AMD EPYC


_RowsBySetting = Mapping[tuple[object, ...], Mapping[int, Row]]
"""Rows at one learning rate by seed, for each (method, sparsity, clip, factor)."""


@dataclass(frozen=True)
class AppendixF:
    """The experiment, with its defaults. Tests make a smaller one."""

    sparsities: tuple[float, ...] = (0.97, 0.95, 0.90)
    searched: tuple[float, ...] = (0.97,)
    """Sparsities at which the settings are also compared at their best rates of ``rates``."""
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    lr: float = 0.1
    """The paper's learning rate, one of ``rates``, at which all settings are compared."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    searching: int = 2
    data: str = "fashion-mnist"
    held_out_images: int = 10_000
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=20_000))

    name = "appendixF"
    source = "Appendix F, at a laptop's size"
    shows = (
        "what a clip over all positions costs, and how much of it D and a scalar without direction give back"
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
        """Return for each sparsity the cases at the paper's rate, then those of the search for rates."""
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
        return [{**case, **trained(Training(Way(**case), self.recipe, self._parts(settings)))}]

    def kept_case(self) -> Case:
        """Return a case of RigL with Eq. 12 and the clip over all positions."""
        return max(
            self.cases([]),
            key=lambda case: (case["clip"] == "dense", case["factor"] == "layer", case["method"] == "rigl"),
        )

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        recipe = replace(self.recipe, update_every=UPDATE_EVERY)
        training = Training(Way(**case), recipe, self._parts(settings))
        convert_inputs(training.model)
        return [float(loss) for loss in islice(training.losses(), steps)]

    def table(self, rows: Sequence[Row]) -> list[str]:
        found = self._at_lr(rows)
        lines = [
            *(line for said in self._finding(found) for line in wrapped(said)),
            "",
            f"test accuracy in %, learning rate {self.lr:g}, and differences in points",
            *self._differences(found, self.sparsities),
            *wrapped(
                "(the clip limits the gradient norm to 1, over active weights or over all positions; 'clip "
                "costs': masked SGD under it minus masked SGD without; Eq. 12, D, scalar: minus masked SGD "
                "under the same clip; ± is the 95% interval of paired seeds, * beyond it, not corrected for "
                "the number of comparisons)"
            ),
            "",
            "gradients of masked SGD, and the share of neurons without an active weight at the end, in %",
            *self._gradients(found),
            *wrapped(
                "(coefficient: of the clip, 1 where it does nothing; norms over all positions and over "
                "active weights; all are means over steps and seeds)"
            ),
            "",
            "what is left of the loss of accuracy that the clip over all positions costs masked SGD",
            *self._left(found),
            *wrapped(
                "(1: nothing is given back; -: there is no loss beyond noise, or training is worse without "
                "the clip; 'own': each against itself without a clip, where the factor is Eq. 12; paper: "
                f"ResNet-20 on CIFAR-100, {_PAPER_EPOCHS} epochs, no HAM, Tables 2, 3, 8, 9)"
            ),
        ]
        for sparsity in self.searched:
            best = self._search(sparsity).at_best_rate(rows)
            lines += [
                "",
                f"sparsity {sparsity:g}, each at its best rate: test accuracy in % (the rate)",
                *_accuracies(best, sparsity),
                "",
                f"sparsity {sparsity:g}, each at its best rate: differences in points, as above",
                *self._differences(best, (sparsity,)),
            ]
        diverged = sum(math.isnan(row["test_accuracy"]) for row in rows)
        lines += [f"{diverged} runs diverged"] if diverged else []
        return [*lines, *still_missing(self, rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        figure.set_size_inches(8, 6.6)
        found = self._at_lr(rows)
        draw_title(figure, *self._finding(found), *still_missing(self, rows))
        places = list(product(self.sparsities, CLIPS))
        grid = figure.subplots(1, 2, sharey=True, sharex=True)
        for axes, (method, name) in zip(grid, _METHODS.items(), strict=True):
            for offset, factor in zip((-0.24, -0.08, 0.08, 0.24), FACTORS, strict=True):
                points = []
                for place, (sparsity, clip) in enumerate(places):
                    ours = _own(found, method, sparsity, clip)[factor]
                    result = self._paired(ours, _own(found, method, sparsity, "none")["none"])
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
        grid[0].set_ylabel("sparsity, clip")
        figure.legend(
            *legend_of(grid),
            loc="outside lower center",
            ncols=4,
            title=f"mean and 95% interval over {fewest_and_most_seeds(found.values())} (a dot alone: fewer "
            f"than {FEWEST_PAIRS}), learning rate {self.lr:g}\nD: gradients of neuron i times √(1 - sᵢ); "
            "scalar: those of a layer times √(1 - s)",
            title_fontsize=8,
        )

    def _differences(self, found: _RowsBySetting, sparsities: Sequence[float]) -> list[str]:
        header = ("", "masked SGD", "clip costs", *(_LABELS[factor] for factor in _FACTORS), "D - scalar")
        lines = []
        for method, sparsity, clip in product(_METHODS, sparsities, CLIPS):
            own = _own(found, method, sparsity, clip)
            if not any(own.values()):
                continue
            pairs = [(own[factor], own["none"]) for factor in _FACTORS]
            pairs = [
                (own["none"], _own(found, method, sparsity, "none")["none"]),
                *pairs,
                (own["D"], own["scalar"]),
            ]
            costs, *others = (_shown(self._paired(*pair)) for pair in pairs)
            lines.append(
                (
                    f"{_METHODS[method]} {sparsity:g}, {_CLIPS[clip]}",
                    _cell(100 * _mean(own["none"], "test_accuracy"), 2),
                    "-" if clip == "none" else costs,
                    *others,
                )
            )
        return aligned([header, *lines])

    def _gradients(self, found: _RowsBySetting) -> list[str]:
        dead = [f"dead, {'SGD' if factor == 'none' else _LABELS[factor]}" for factor in FACTORS]
        lines = []
        for method, sparsity, clip in product(_METHODS, self.sparsities, CLIPS):
            own = _own(found, method, sparsity, clip)
            if any(own.values()):
                columns = {"clip_coefficient": 3, "norm_all": 2, "norm_active": 2}
                cells = [_cell(_mean(own["none"], column), digits) for column, digits in columns.items()]
                cells += [_cell(100 * _mean(rows, "dead_share"), 1) for rows in own.values()]
                lines.append((f"{_METHODS[method]} {sparsity:g}, {_CLIPS[clip]}", *cells))
        return aligned([("", "coefficient", "norm, all", "norm, active", *dead), *lines])

    def _left(self, found: _RowsBySetting) -> list[str]:
        lines: list[tuple[str, ...]] = [("", "D", "D, own", "scalar", "Eq. 12", "paper", "paper, own")]
        for method, sparsity in product(_METHODS, self.sparsities):
            means = {
                (clip, factor): _mean(rows, "test_accuracy")
                for clip in CLIPS
                for factor, rows in _own(found, method, sparsity, clip).items()
            }
            costs = self._paired(*(_own(found, method, sparsity, clip)["none"] for clip in ("dense", "none")))
            shares = ["-"] * 4
            if costs is not None and costs.mean < 0 and costs.beyond_noise:
                pairs = (("none", "D"), ("layer", "D"), ("none", "scalar"), ("none", "layer"))
                shares = [_share_left(means, *pair) for pair in pairs]
            lines.append((f"{_METHODS[method]} {sparsity:g}", *shares, *_paper_left(method, sparsity)))
        return aligned(lines)

    def _finding(self, found: _RowsBySetting) -> list[str]:
        """Return sentences on the cost of the clips and the part that the factors regain, at the first
        sparsity with results."""
        for sparsity in self.sparsities:
            said = []
            for method, name in _METHODS.items():
                by_clip = {clip: _own(found, method, sparsity, clip) for clip in CLIPS}
                costs = {
                    words: self._paired(by_clip[clip]["none"], by_clip["none"]["none"])
                    for clip, words in (("active", "over active weights"), ("dense", "over all positions"))
                }
                back = {
                    _LABELS[factor]: self._paired(by_clip["dense"][factor], by_clip["dense"]["none"])
                    for factor in _FACTORS
                }
                if any(costs.values()):
                    said.append(f"{name}: a clip {_listed(costs)}")
                if any(back.values()):
                    said.append(f"given back of that under {name}: {_listed(back)}")
            if said:
                return [
                    f"masked SGD at sparsity {sparsity:g}, points of test accuracy (*: beyond noise)",
                    *said,
                ]
        return ["no clip can be compared yet"]

    def _paired(self, a: Mapping[int, Row], b: Mapping[int, Row]) -> Paired | None:
        """Return the difference ``a - b`` in points of test accuracy; None if no seed has both or a run
        diverged."""
        found = differences(a, b, "test_accuracy")
        if not found or any(map(math.isnan, found)):
            return None
        return paired(found, 100 / self.recipe.test_pairs)

    def _at_lr(self, rows: Sequence[Row]) -> _RowsBySetting:
        by_setting: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            by_setting.setdefault(tuple(row[name] for name in self.key[:4]), []).append(row)
        return {setting: at_rate(own, self.lr) for setting, own in by_setting.items()}

    def _settings(self, sparsity: float) -> list[Setting]:
        return [
            {"method": method, "sparsity": sparsity, "clip": clip, "factor": factor}
            for method, clip, factor in product(_METHODS, CLIPS, FACTORS)
        ]

    def _search(self, sparsity: float) -> Search:
        return Search(
            settings=self._settings(sparsity),
            rates=lambda setting: self.rates,
            seeds=self.seeds,
            searching=self.searching,
        )

    def _parts(self, settings: Settings) -> Parts:
        return parts(self.data, settings.data_dir, self.held_out_images)


def _own(found: _RowsBySetting, method: str, sparsity: float, clip: str) -> dict[str, Mapping[int, Row]]:
    """Return the rows of a method, sparsity and clip by factor."""
    return {factor: found.get((method, sparsity, clip, factor), {}) for factor in FACTORS}


def _accuracies(found: _RowsBySetting, sparsity: float) -> list[str]:
    lines = []
    for method, clip in product(_METHODS, CLIPS):
        own = _own(found, method, sparsity, clip).values()
        if any(own):
            cells = [
                f"{_cell(100 * _mean(rows, 'test_accuracy'), 2)} ({rate_of(rows):g})" if rows else "-"
                for rows in own
            ]
            lines.append((f"{_METHODS[method]}, {_CLIPS[clip]}", *cells))
    return aligned([("", *_LABELS.values()), *lines])


def _share_left(means: Mapping[tuple[str, str], float], unclipped: str, factor: str) -> str:
    """Return the cost of the clip over all positions under a factor, divided by its cost for masked SGD.

    A dash where training with the factor is worse without the clip.
    """
    costs_sgd = means["none", "none"] - means["dense", "none"]
    costs = means["none", unclipped] - means["dense", factor]
    is_worse_without = unclipped != "none" and costs < 0
    return "-" if math.isnan(costs) or is_worse_without else f"{costs / costs_sgd:.2f}"


def _paper_left(method: str, sparsity: float) -> tuple[str, str]:
    without, clipped = _PAPER_TABLES[method]
    found = {
        (table, optimizer): PAPER[table].get(
            Cell(dst=method, sparsity=sparsity, optimizer=optimizer, ham=False, epochs=_PAPER_EPOCHS)
        )
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
    """Return the mean of a column over seeds; NaN without rows, or if a run diverged."""
    return fmean(row[column] for row in rows.values()) if rows else math.nan


def _cell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _listed(results: Mapping[str, Paired | None]) -> str:
    return ", ".join(
        f"{words} {result.mean:+.1f}{star(result)}" for words, result in results.items() if result is not None
    )


def _shown(result: Paired | None) -> str:
    return "-" if result is None else signed(result) + star(result)
