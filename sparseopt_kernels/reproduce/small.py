"""What makes RigL stable at a laptop's size, and what does Eq. 12 add then? Three networks, three ways to choose
masks, three sparsities, masked SGD and Eq. 12, with a limit of the gradient's norm, with the step left out that
follows an update of the masks, with both and with neither; each at the learning rate that is best for it on
held-out images.

How rates are searched is in ``searched.py``, the table in ``small_table.py``. What a per-neuron factor should do
by theory is tested in ``prediction.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..training.config import Config
from ..training.data import load_dataset
from ..training.paired import Paired, paired
from ..training.run import Run
from .experiment import Case, Row, Settings
from .first_steps import first_losses
from .interval_picture import draw_intervals
from .searched import RESULTS, Images, Search, Setting, differences, images, measured
from .small_table import METHODS, MODELS, OPTIMIZERS, REMEDIES, Comparison, Place, title, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CORRECTION = {"sgd": "sgd", "eq12": "sparseopt"}


class _Remedy(NamedTuple):
    max_grad_norm: float | None
    skip_step: bool


_REMEDIES = {
    "none": _Remedy(None, skip_step=False),
    "clip": _Remedy(1.0, skip_step=False),
    "skip": _Remedy(None, skip_step=True),
    "both": _Remedy(1.0, skip_step=True),
}
# SET grows at random, and static masks have no step that follows an update.
_REMEDIES_OF = {"rigl": tuple(_REMEDIES), "set": ("none", "both"), "static": ("none",)}
_COLOURS = {"none": "#000000", "clip": "#0072b2", "skip": "#e69f00", "both": "#cc79a7"}
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


@dataclass(frozen=True)
class Small:
    """The defaults are the experiment; a smaller one can be made for a test."""

    models: tuple[str, ...] = ("mlp", "convnet", "resnet8")
    methods: tuple[str, ...] = ("rigl", "set", "static")
    # The sparsest first: there the published updates of RigL do most harm.
    sparsities: tuple[float, ...] = (0.99, 0.97, 0.95)
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
        "remedy": str,
        "lr": float,
        "seed": int,
        **RESULTS,
    }
    key = ("model", "method", "sparsity", "optimizer", "remedy", "lr", "seed")

    @property
    def shows(self) -> str:
        later = len(self._search().settings) * (len(self.seeds) - self.searching)
        return (
            "what a clip and a skipped step are worth, and the correction with them; "
            f"{later} more runs once rates are known"
        )

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return self._search().cases(rows)

    def seconds(self, case: Case) -> float:
        return _SECONDS[case["model"]]

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        return [{**case, **measured(self._run(case, settings), self._images(case, settings))}]

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        return first_losses(self._run(case, settings), steps)

    def table(self, rows: Sequence[Row]) -> list[str]:
        best = self._search().at_best_rate(rows)
        at_best = {(Place(*key[:3]), str(key[3]), str(key[4])): own for key, own in best.items()}
        comparisons = self.comparisons(rows)
        lines = written(at_best, comparisons, self.sparsities, 100 / self.test_images)
        at_end = sum(_is_at_end(place.model, own) for (place, *_), own in at_best.items())
        lines.append(f"the best rate is at an end of its grid in {at_end} of {len(best)} searches")
        unknown = len(self._search().settings) - len(best)
        if unknown:
            lines.append(
                f"{unknown} of {unknown + len(best)} settings have no best rate: not searched, or diverged"
            )
        missing = len(self.cases(rows)) - len(rows)
        if missing:
            lines.append(f"{missing} of {missing + len(rows)} runs that are known of are still to be made")
        return lines

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        comparisons = self.comparisons(rows)
        figure.set_size_inches(8.6, 10)
        figure.suptitle(title(comparisons), fontsize=10.5, fontweight="bold")
        panels = {
            "a remedy, masked SGD": "remedy - none, SGD",
            "a remedy, Eq. 12": "remedy - none, Eq. 12",
            "Eq. 12": "Eq. 12 - masked SGD",
        }
        grid = figure.subplots(len(panels), len(self.models), squeeze=False, sharex=True)
        for i, (kind, label) in enumerate(panels.items()):
            for j, model in enumerate(self.models):
                own = [c for c in comparisons if c.kind == kind and c.place.model == model]
                self._draw_panel(grid[i, j], own)
                grid[i, j].set_title(f"{MODELS[model]}: {label}", loc="left", fontsize=8.5)
        for axes in grid[-1]:
            axes.set_xlabel("points (log beyond 1)")
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        shown = [remedy for remedy in map(REMEDIES.get, _REMEDIES) if remedy in handles]
        figure.legend(
            [handles[remedy] for remedy in shown],
            shown,
            loc="outside lower center",
            ncols=4,
            title="the remedy (of both, in the last row); each at its best rate, 95% intervals over seeds",
        )

    def comparisons(self, rows: Sequence[Row]) -> list[Comparison]:
        """Each remedy against none, for either optimizer, and Eq. 12 against masked SGD under each remedy,
        wherever both best rates are known."""
        best = self._search().at_best_rate(rows)
        found = []
        for place in self._places():
            remedies = _REMEDIES_OF[place.method]
            pairs = [
                (f"a remedy, {label}", remedy, (optimizer, remedy), (optimizer, "none"))
                for optimizer, label in OPTIMIZERS.items()
                for remedy in remedies[1:]
            ]
            pairs += [("Eq. 12", remedy, ("eq12", remedy), ("sgd", remedy)) for remedy in remedies]
            for kind, remedy, ours, baseline in pairs:
                a, b = (best.get((*place, *setting)) for setting in (ours, baseline))
                if a and b and a.keys() & b.keys():
                    result = self._paired(a, b)
                    found.append(Comparison(kind, place, remedy, a, b, result))
        return found

    def _paired(self, a: Mapping[int, Row], b: Mapping[int, Row]) -> Paired:
        return paired(differences(a, b, "test_accuracy"), 100 / self.test_images)

    def _places(self) -> list[Place]:
        """RigL first, and of it the smallest network."""
        return [
            Place(model, method, sparsity)
            for method, model, sparsity in product(self.methods, self.models, self.sparsities)
        ]

    def _search(self) -> Search:
        settings: list[Setting] = [
            {**place._asdict(), "optimizer": optimizer, "remedy": remedy}
            for place in self._places()
            for remedy in _REMEDIES_OF[place.method]
            for optimizer in OPTIMIZERS
        ]
        return Search(settings, lambda setting: _RATES[str(setting["model"])], self.seeds, self.searching)

    def _images(self, case: Case, settings: Settings) -> Images:
        pooling = _POOLING[case["model"]]
        return images(self.data, settings.data_dir, self.train_images, self.held_out_images, pooling)

    def _run(self, case: Case, settings: Settings) -> Run:
        remedy: dict[str, Any] = {**_REMEDIES[case["remedy"]]._asdict(), "max_grad_norm_over": "active"}
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
            **remedy,
        )
        dataset = self._images(case, settings).dataset
        return Run(config, dataset, _CORRECTION[case["optimizer"]], case["seed"])

    def _draw_panel(self, axes: Axes, comparisons: Sequence[Comparison]) -> None:
        places = list(product(self.methods, self.sparsities))
        for offset, remedy in zip((-0.27, -0.09, 0.09, 0.27), _REMEDIES, strict=True):
            points = [
                (places.index((c.place.method, c.place.sparsity)) + offset, c.result)
                for c in comparisons
                if c.remedy == remedy
            ]
            if points:
                draw_intervals(axes, points, _COLOURS[remedy], REMEDIES[remedy])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(places)), [f"{METHODS[m]} {s:g}" for m, s in places], fontsize=7.5)
        axes.set_ylim(len(places) - 0.5, -0.5)
        for border in range(len(self.sparsities), len(places), len(self.sparsities)):
            axes.axhline(border - 0.5, color="#bbbbbb", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xticks([-10, -1, 0, 1, 10], ["-10", "-1", "0", "1", "10"])


def _is_at_end(model: str, rows: Mapping[int, Row]) -> bool:
    """Whether the rate that all rows have is the first or the last of its grid."""
    lr = next(iter(rows.values()))["lr"]
    return lr in (min(_RATES[model]), max(_RATES[model]))
