"""The experiment ``small``: tests remedies that make RigL stable, and Eq. 12 with each of them, at a laptop's
size.

It has three networks, three ways to choose masks, three sparsities, and masked SGD and Eq. 12. The remedies
are a clip of the gradient norm, a skipped step after each mask update, both, one input kept for each neuron,
and none. Each setting is compared at its best learning rate on held-out images.

``searched.py`` searches the rates, ``small_table.py`` has the comparisons and the table, ``small_picture.py``
the picture. ``prediction.py`` tests the effect of a per-neuron factor that theory predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar

from ..training.config import Config
from ..training.data import load_dataset
from ..training.run import Run
from .experiment import Case, Row, Settings
from .first_steps import UPDATE_EVERY, first_losses
from .searched import RESULTS, Images, Search, Setting, images, measured, rate_of
from .small_picture import draw_small
from .small_table import OPTIMIZERS, REMEDIES, AtBest, Place, compared, written
from .table_text import still_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CORRECTION = {"sgd": "sgd", "eq12": "sparseopt"}

# Fewer for SET, which grows at random, and none for static masks, which have no updates.
REMEDIES_OF = {
    "rigl": ("none", "clip", "skip", "both", "alive"),
    "set": ("none", "both"),
    "static": ("none",),
}
# Averaging images over 2x2 pixels makes convolutions four times cheaper. Narrower layers would do so too, but
# at sparsity 0.99 they would have hardly any weights left.
_POOLING = {"mlp": 1, "convnet": 2, "resnet8": 2, "resnet20": 2}
RATES = {
    "mlp": (0.003, 0.01, 0.03, 0.1, 0.3),
    "convnet": (0.01, 0.03, 0.1, 0.3, 1.0),
    "resnet8": (0.01, 0.03, 0.1, 0.3, 1.0),
}
# With one thread of a shared AMD EPYC, RigL at sparsity 0.97, testing included.
_SECONDS = {"mlp": 4.5, "convnet": 11.0, "resnet8": 14.5, "resnet20": 380.0}


@dataclass(frozen=True)
class Small:
    """The experiment ``small``, with its defaults. ``resnet20.py`` has other values, tests smaller ones."""

    name: str = "small"
    source: str = "Sections 5.1 and 5.2, at a laptop's size"
    models: tuple[str, ...] = ("mlp", "convnet", "resnet8")
    methods: tuple[str, ...] = ("rigl", "set", "static")
    # The sparsest first, where the published updates of RigL do most harm.
    sparsities: tuple[float, ...] = (0.99, 0.97, 0.95)
    remedies: Mapping[str, Sequence[str]] = field(default_factory=lambda: REMEDIES_OF)
    """The remedies to test, by method."""
    rates: Mapping[str, Sequence[float]] = field(default_factory=lambda: RATES)
    """The learning rates to search, by model, from low to high."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    searching: int = 2
    data: str = "fashion-mnist"
    train_images: int = 10_000
    held_out_images: int = 5_000
    test_images: int = 10_000
    epochs: int = 2
    update_every: int = 25
    channels_last: bool = False
    """True for weights and images in ``channels_last`` memory format."""

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
        return f"what a clip and a skipped step are worth, and Eq. 12 with them; {later} more runs follow"

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return self._search().cases(rows)

    def seconds(self, case: Case) -> float:
        return _SECONDS[case["model"]]

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        return [{**case, **measured(self._run(case, settings), self._images(case, settings))}]

    def kept_case(self) -> Case:
        clipped = [case for case in self.cases([]) if REMEDIES[case["remedy"]].max_grad_norm]
        return max(
            clipped, key=lambda case: (case["optimizer"] == "eq12", REMEDIES[case["remedy"]].skip_step)
        )

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        return first_losses(replace(self, update_every=UPDATE_EVERY)._run(case, settings), steps)

    def table(self, rows: Sequence[Row]) -> list[str]:
        at_best, resolution = self._at_best(rows), 100 / self.test_images
        lines = written(at_best, compared(at_best, resolution), self.sparsities, resolution)
        searched = {way: self.rates[way[0].model] for way in at_best if len(self.rates[way[0].model]) > 1}
        if searched:
            at_end = sum(rate_of(at_best[way]) in (rates[0], rates[-1]) for way, rates in searched.items())
            lines.append(f"the best rate is at an end of its grid in {at_end} of {len(searched)} searches")
        elif at_best:
            lines.append("learning rates were not searched")
        unknown = len(self._search().settings) - len(at_best)
        if unknown:
            lines.append(
                f"{unknown} of {unknown + len(at_best)} settings have no best rate: not searched, or diverged"
            )
        return [*lines, *still_missing(self, rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        resolution = 100 / self.test_images
        draw_small(figure, self._at_best(rows), self.sparsities, resolution, still_missing(self, rows))

    def _at_best(self, rows: Sequence[Row]) -> AtBest:
        best = self._search().at_best_rate(rows)
        return {(Place(*key[:3]), *key[3:]): own for key, own in best.items()}  # type: ignore[arg-type,misc]

    def _places(self) -> list[Place]:
        """Return all places, RigL and the smallest network first."""
        return [
            Place(model, method, sparsity)
            for method, model, sparsity in product(self.methods, self.models, self.sparsities)
        ]

    def _search(self) -> Search:
        settings: list[Setting] = [
            {**place._asdict(), "optimizer": optimizer, "remedy": remedy}
            for place in self._places()
            for remedy in self.remedies[place.method]
            for optimizer in OPTIMIZERS
        ]
        return Search(
            settings=settings,
            rates=lambda setting: self.rates[str(setting["model"])],
            seeds=self.seeds,
            searching=self.searching,
        )

    def _images(self, case: Case, settings: Settings) -> Images:
        pooling = _POOLING[case["model"]]
        return images(self.data, settings.data_dir, self.train_images, self.held_out_images, pooling)

    def _run(self, case: Case, settings: Settings) -> Run:
        remedy = REMEDIES[case["remedy"]]
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
            max_grad_norm=remedy.max_grad_norm,
            max_grad_norm_over="active",
            skip_step=remedy.skip_step,
            min_fan_in=remedy.min_fan_in,
            channels_last=self.channels_last,
        )
        dataset = self._images(case, settings).dataset
        return Run(config, dataset, _CORRECTION[case["optimizer"]], case["seed"])
