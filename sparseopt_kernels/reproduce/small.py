"""Does the correction help at a laptop's size? Three networks, three ways to choose masks, three sparsities,
four optimizers, each at the learning rate that is best for it on held-out images.

How rates are searched is in ``searched.py``. What a per-neuron factor should do by theory is tested in
``prediction.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..text_table import aligned
from ..training.config import Config
from ..training.data import load_dataset
from ..training.paired import FEWEST_PAIRS, Paired, holm, paired
from .experiment import Case, Row, Settings
from .interval_picture import draw_intervals
from .searched import RESULTS, Search, Setting, differences, images, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# correction and alpha of HAM: h1 of Table 4 is 80
OPTIMIZERS = {
    "sgd": ("sgd", 0.0),
    "eq12": ("sparseopt", 0.0),
    "sgd+ham": ("sgd", 80.0),
    "eq12+ham": ("sparseopt", 80.0),
}
_PAIRS = (("eq12", "sgd"), ("eq12+ham", "sgd+ham"))
_COLOURS = {"eq12": "#0072b2", "eq12+ham": "#56b4e9"}
_LABELS = {"sgd": "masked SGD", "eq12": "Eq. 12", "sgd+ham": "SGD + HAM", "eq12+ham": "Eq. 12 + HAM"}
_MODEL_LABELS = {"mlp": "MLP", "convnet": "convnet", "resnet8": "ResNet-8"}
_METHOD_COLOURS = {"static": "#999999", "set": "#009e73", "rigl": "#cc79a7"}
_METHOD_LABELS = {"static": "static", "set": "SET", "rigl": "RigL"}
# Averaging the image over 2x2 pixels makes convolutions four times cheaper at their full width, without which
# a layer at sparsity 0.99 has no weights left to speak of.
_POOLING = {"mlp": 1, "convnet": 2, "resnet8": 2}
_RATES = {
    "mlp": (0.003, 0.01, 0.03, 0.1, 0.3),
    "convnet": (0.01, 0.03, 0.1, 0.3, 1.0),
    "resnet8": (0.01, 0.03, 0.1, 0.3, 1.0),
}
# Of one thread of an AMD EPYC that others were using, too; with RigL at 0.97, testing included.
_SECONDS = {"mlp": 4.5, "convnet": 11.0, "resnet8": 14.5}
_HAM_SECONDS = 0.5
_TIMES = {"quarter_epoch": 0.25, "half_epoch": 0.5, "first_epoch": 1.0}


class Comparison(NamedTuple):
    """An optimizer against its baseline in one setting, each at its own best rate."""

    model: str
    method: str
    sparsity: float
    optimizer: str
    baseline: str
    rows: dict[int, Row]
    baseline_rows: dict[int, Row]
    result: Paired
    """In percentage points of test accuracy."""


@dataclass(frozen=True)
class Small:
    """The defaults are the experiment; a smaller one can be made for a test."""

    models: tuple[str, ...] = ("mlp", "convnet", "resnet8")
    methods: tuple[str, ...] = ("rigl", "set", "static")
    sparsities: tuple[float, ...] = (0.95, 0.97, 0.99)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    searching: int = 2
    data: str = "fashion-mnist"
    train_images: int = 10_000
    held_out_images: int = 5_000
    test_images: int = 10_000
    epochs: int = 2
    update_every: int = 25

    name = "small"
    source = "Sections 5.1 and 5.2, at a laptop's size"
    columns: ClassVar[Mapping[str, type]] = {
        "model": str,
        "method": str,
        "sparsity": float,
        "optimizer": str,
        "lr": float,
        "seed": int,
        **RESULTS,
    }
    key = ("model", "method", "sparsity", "optimizer", "lr", "seed")

    @property
    def shows(self) -> str:
        later = len(self._search().settings) * (len(self.seeds) - self.searching)
        return f"what the correction does to accuracy; {later} more runs once rates are known"

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return self._search().cases(rows)

    def seconds(self, case: Case) -> float:
        return _SECONDS[case["model"]] + (_HAM_SECONDS if OPTIMIZERS[case["optimizer"]][1] else 0.0)

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        correction, ham_alpha = OPTIMIZERS[case["optimizer"]]
        config = Config(
            epochs=self.epochs,
            batch_size=64,
            warmup_epochs=1,
            update_every=self.update_every,
            threads=1,
            device="cpu",
            data=self.data,
            model=case["model"],
            method=case["method"],
            sparsity=case["sparsity"],
            lr=case["lr"],
            ham_alpha=ham_alpha,
        )
        data = images(
            self.data, settings.data_dir, self.train_images, self.held_out_images, _POOLING[case["model"]]
        )
        return [{**case, **measured(config, data, correction, case["seed"])}]

    def table(self, rows: Sequence[Row]) -> list[str]:
        comparisons = self.comparisons(rows)
        judged = [c for c in comparisons if not math.isnan(c.result.p_value)]
        adjusted = dict(zip(map(_name, judged), holm([c.result.p_value for c in judged]), strict=True))
        header = (
            "model",
            "method",
            "sparsity",
            "compared",
            "accuracy in % (lr)",
            "",
            "difference",
            "p, Holm",
        )
        lines = aligned([header, *(_line(c, adjusted.get(_name(c))) for c in comparisons)])
        lines.append(
            "(test accuracy after the last epoch, mean over seeds; the second minus the first in points; ± "
            "is the 95% interval of paired seeds; * beyond noise by itself, ** also after Holm's correction)"
        )
        for optimizer, baseline in _PAIRS:
            own = [c for c in judged if c.optimizer == optimizer]
            lines.append(_summary(optimizer, baseline, own, adjusted, len(judged)))
        lines += [
            "",
            *aligned(
                [
                    (
                        "mean differences",
                        "masks",
                        "all",
                        *map(str, self.sparsities),
                        "100 x training loss, all",
                    ),
                    *self._pooled(judged),
                ]
            ),
        ]
        lines.append(
            "(each seed's mean over the settings; ± over seeds, not corrected for the number of means)"
        )
        edges = sum(_at_edge(c.model, rows) for c in comparisons for rows in (c.rows, c.baseline_rows))
        lines.append(f"the best rate is at an end of its grid in {edges} of {2 * len(comparisons)} searches")
        unknown = len(self._search().settings) - 2 * len(comparisons)
        if unknown:
            lines.append(f"{unknown} settings are not compared: not finished, or diverged at every rate")
        return lines

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        figure.set_size_inches(8, 7.4)
        figure.suptitle(
            "Final test accuracy: what Eq. 12 changes, each optimizer at its best learning rate",
            fontsize=11,
            fontweight="bold",
        )
        grid = figure.subplots(2, len(self.models), squeeze=False, height_ratios=(1.35, 1))
        comparisons = self.comparisons(rows)
        for column, model in enumerate(self.models):
            self._draw_differences(grid[0, column], [c for c in comparisons if c.model == model])
            self._draw_early(grid[1, column], [c for c in comparisons if c.model == model])
            grid[0, column].set_title(_MODEL_LABELS[model], loc="left")
        grid[0, 0].set_ylabel("masks, sparsity")
        grid[1, 0].set_ylabel("difference in accuracy (points)")
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=2,
            title="95% intervals over seeds",
        )

    def comparisons(self, rows: Sequence[Row]) -> list[Comparison]:
        """Eq. 12 against none, without and with HAM, wherever both best rates are known."""
        best = self._search().at_best_rate(rows)
        found = []
        for pair, model, method, sparsity in product(_PAIRS, self.models, self.methods, self.sparsities):
            a, b = (best.get((model, method, sparsity, optimizer)) for optimizer in pair)
            if a and b:
                result = paired(differences(a, b, "test_accuracy"), 100 / self.test_images)
                found.append(Comparison(model, method, sparsity, *pair, a, b, result))
        return found

    def _pooled(self, comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
        """Over all settings of a method and over those of one sparsity: a single one tells little."""
        lines = []
        for (optimizer, baseline), method in product(_PAIRS, self.methods):
            own = [c for c in comparisons if (c.optimizer, c.method) == (optimizer, method)]
            groups = [own, *([c for c in own if c.sparsity == sparsity] for sparsity in self.sparsities)]
            cells = [_shown(group, "test_accuracy", 100 / self.test_images) for group in groups]
            cells.append(_shown(own, "train_loss", 1e-6))
            lines.append((f"{_LABELS[optimizer]} - {_LABELS[baseline]}", _METHOD_LABELS[method], *cells))
        return lines

    def _search(self) -> Search:
        columns = ("model", "method", "sparsity", "optimizer")
        values = product(self.models, self.methods, self.sparsities, OPTIMIZERS)
        settings: list[Setting] = [dict(zip(columns, v, strict=True)) for v in values]
        return Search(settings, lambda setting: _RATES[str(setting["model"])], self.seeds, self.searching)

    def _draw_differences(self, axes: Axes, comparisons: Sequence[Comparison]) -> None:
        places = [(method, sparsity) for method in self.methods for sparsity in self.sparsities]
        for offset, (optimizer, _) in zip((-0.17, 0.17), _PAIRS, strict=True):
            points = [
                (places.index((c.method, c.sparsity)) + offset, c.result)
                for c in comparisons
                if c.optimizer == optimizer
            ]
            label = f"{_LABELS[optimizer]} - same without Eq. 12, at the end"
            draw_intervals(axes, points, _COLOURS[optimizer], label)
        axes.axvline(0, color="black", linewidth=0.8)
        labels = [f"{_METHOD_LABELS[method]} {sparsity:g}" for method, sparsity in places]
        axes.set_yticks(range(len(places)), labels, fontsize=7.5)
        axes.set_ylim(len(places) - 0.5, -0.5)
        for border in range(len(self.sparsities), len(places), len(self.sparsities)):
            axes.axhline(border - 0.5, color="#bbbbbb", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.margins(x=0.08)
        axes.set_xticks([-10, -1, 0, 1], ["-10", "-1", "0", "1"])
        axes.set_xlabel("difference in final test accuracy\n(points; log beyond 1)")

    def _draw_early(self, axes: Axes, comparisons: Sequence[Comparison]) -> None:
        """Without HAM, averaged over sparsities."""
        for k, method in enumerate(self.methods):
            own = [c for c in comparisons if (c.optimizer, c.method) == ("eq12", method)]
            if not own:
                continue
            points = [
                (x + 0.12 * (k - 1), _pooled_difference(own, column, 100 / self.held_out_images))
                for x, column in enumerate((*_TIMES, "test_accuracy"))
            ]
            label = f"Eq. 12 - masked SGD, {_METHOD_LABELS[method]}"
            draw_intervals(axes, points, _METHOD_COLOURS[method], label, upright=True)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(_TIMES) + 1), ["¼ epoch", "½", "1", "end (test)"])


def _name(c: Comparison) -> tuple[object, ...]:
    return c[:5]


def _line(c: Comparison, adjusted: float | None) -> tuple[str, ...]:
    accuracies = [
        f"{100 * mean(row['test_accuracy'] for row in rows.values()):.2f} ({_lr(rows):g})"
        for rows in (c.baseline_rows, c.rows)
    ]
    difference, star = f"{c.result.mean:+.2f}", ""
    if adjusted is not None:
        star = "**" if adjusted < 0.05 else "*" if c.result.beyond_noise else ""
        difference += f" ± {c.result.half_width:.2f}"
    p = "" if adjusted is None else f"{adjusted:.2g} {star}".strip()
    place = (_MODEL_LABELS[c.model], _METHOD_LABELS[c.method], f"{c.sparsity:g}")
    return (*place, f"{c.baseline}, {c.optimizer}", *accuracies, difference, p)


def _summary(
    optimizer: str,
    baseline: str,
    own: Sequence[Comparison],
    adjusted: Mapping[tuple[object, ...], float],
    family: int,
) -> str:
    if not own:
        return f"{_LABELS[optimizer]} - {_LABELS[baseline]}: no setting has {FEWEST_PAIRS} seeds yet"
    better = [c for c in own if c.result.beyond_noise and c.result.mean > 0]
    worse = [c for c in own if c.result.beyond_noise and c.result.mean < 0]
    sure = [sum(adjusted[_name(c)] < 0.05 for c in group) for group in (better, worse)]
    return (
        f"{_LABELS[optimizer]} - {_LABELS[baseline]}: {mean(c.result.mean for c in own):+.2f} points over "
        f"{len(own)} settings; better beyond noise in {len(better)}, worse in {len(worse)}; after Holm's "
        f"correction for {family} comparisons {sure[0]} and {sure[1]}"
    )


def _pooled_difference(comparisons: Sequence[Comparison], column: str, resolution: float) -> Paired:
    """Of each seed's mean over the settings, in percentage points."""
    by_setting = [differences(c.rows, c.baseline_rows, column) for c in comparisons]
    return paired([mean(values) for values in zip(*by_setting, strict=False)], resolution)


def _shown(comparisons: Sequence[Comparison], column: str, resolution: float) -> str:
    if not comparisons:
        return "-"
    result = _pooled_difference(comparisons, column, resolution)
    return f"{result.mean:+.2f} ± {result.half_width:.2f}"


def _lr(rows: Mapping[int, Row]) -> float:
    """The rate that all rows have."""
    return float(next(iter(rows.values()))["lr"])


def _at_edge(model: str, rows: Mapping[int, Row]) -> bool:
    return _lr(rows) in (min(_RATES[model]), max(_RATES[model]))
