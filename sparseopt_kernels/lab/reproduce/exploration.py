"""Figures 5 and 10: RigL's exploration rate, with original or corrected gradients for regrowth.

The rate itself, R_m, is counted in ``topology/explored.py``; here it is measured over sparsity and
over the length of training, and compared with that of masked SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from ...text_table import aligned
from ..training.config import new_config
from ..training.data import load_dataset
from ..training.paired import t_quantile
from ..training.run import Run
from .experiment import Case, Row, Settings
from .first_steps import UPDATE_EVERY, first_losses
from .interval_picture import draw_means, legend_of
from .picture_titles import beyond_noise, draw_title
from .table_text import mean_and_spread, seeds_of, still_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Arm(NamedTuple):
    """A setting to compare: the optimizer of the weights, and the gradient by which weights are grown."""

    optimizer: str
    regrow: str


BASELINE = Arm("sgd", "original")
ARMS = {
    BASELINE: "masked SGD",
    Arm("sparseopt", "original"): "SparseOpt, grown by g",
    Arm("sparseopt", "corrected"): "SparseOpt, grown by c g",
}
_COMPARED = tuple(arm for arm in ARMS if arm != BASELINE)
_COLOURS = dict(zip(ARMS, ("#d55e00", "#0072b2", "#009e73"), strict=True))  # Okabe and Ito
_MARKERS = dict(zip(ARMS, ("o", "s", "^"), strict=True))


@dataclass(frozen=True)
class Exploration:
    """The exploration rate R_m of RigL at the end of training, over sparsity, for each of ``ARMS``.

    Runs of one seed start from the same weights and masks and see the same batches, so arms are compared seed
    by seed.

    Args:
        name, source, shows: as in ``Experiment``.
        paper: the paper's own setting, for the table.
        data, model: as in ``Config``.
        examples: the numbers of training and test examples; all if there are fewer.
        epochs: lengths of training, each with a schedule of its own.
        update_every: steps between mask updates. They are fewer than the paper's 100, because exploration
            depends on the number of updates, and these runs are short.
        seconds_per_epoch: with one thread of a current processor.
        sparsities, seeds: of the runs.
    """

    name: str
    source: str
    shows: str
    paper: str
    data: str
    model: str
    examples: tuple[int, int]
    epochs: tuple[int, ...]
    update_every: int
    seconds_per_epoch: float
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.97)

    key = ("epochs", "sparsity", "optimizer", "regrow", "seed")

    @property
    def columns(self) -> Mapping[str, type]:
        return {
            "epochs": int,
            "sparsity": float,
            "optimizer": str,
            "regrow": str,
            "seed": int,
            "mask_updates": int,
            "exploration_rate": float,
            "test_accuracy": float,
            "diverged": bool,
        }

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return [
            {"epochs": epochs, "sparsity": sparsity, **arm._asdict(), "seed": seed}
            for epochs in self.epochs
            for sparsity in self.sparsities
            for seed in self.seeds
            for arm in ARMS
        ]

    def seconds(self, case: Case) -> float:
        epochs: int = case["epochs"]
        return self.seconds_per_epoch * epochs

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, self._data_dir(settings))

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        run = self._run(case, settings)
        assert run.topology is not None
        topology, updates = run.topology, 0

        def count() -> None:
            nonlocal updates
            updates += topology.updated

        while not run.done:
            row = run.train_epoch(count)
        return [
            {
                **case,
                "mask_updates": updates,
                "exploration_rate": row.exploration_rate,
                "test_accuracy": row.test_accuracy,
                "diverged": run.diverged,
            }
        ]

    def kept_case(self) -> Case:
        """Return the sparsest case of Eq. 12 that grows by corrected gradients."""
        return max(
            self.cases([]),
            key=lambda case: (
                case["optimizer"] == "sparseopt",
                case["regrow"] == "corrected",
                case["sparsity"],
            ),
        )

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        return first_losses(replace(self, update_every=UPDATE_EVERY)._run(case, settings), steps)

    def _run(self, case: Case, settings: Settings) -> Run:
        config = new_config(
            {
                "data": self.data,
                "model": self.model,
                "method": "rigl",
                "regrow": case["regrow"],
                "sparsity": case["sparsity"],
                "epochs": case["epochs"],
                "warmup_epochs": 1,
                "batch_size": 64,
                "update_every": self.update_every,
                "max_grad_norm": None,
                "threads": 1,
                "device": "cpu",
            }
        )
        dataset = load_dataset(self.data, self._data_dir(settings)).first(*self.examples)
        return Run(config, dataset, case["optimizer"], case["seed"])

    def _data_dir(self, settings: Settings) -> str | None:
        return settings.data_dir if self.data != "digits" else None  # digits comes with scikit-learn

    def table(self, rows: Sequence[Row]) -> list[str]:
        header = ("epochs, sparsity", *ARMS.values(), "by g - SGD", "by c g - SGD")
        body = []
        for epochs in self.epochs:
            for sparsity in self.sparsities:
                rates = {arm: self.rates(rows, arm, epochs, sparsity) for arm in ARMS}
                cells = [mean_and_spread(list(rates[arm].values()), 2) for arm in ARMS]
                cells += [
                    "-" if d is None else f"{d.mean:+.2f} ± {d.half_width:.2f}"
                    for d in (difference(rates[arm], rates[BASELINE]) for arm in _COMPARED)
                ]
                body.append((f"{epochs:3d}, {sparsity:g}", *cells))
        updates = ", ".join(str(max(self._updates(rows, epochs), default=0)) for epochs in self.epochs)
        diverged = sum(row["diverged"] for row in rows)
        return [
            *aligned([header, *body]),
            f"R_m in % (weights ever active): mean ± standard deviation over {seeds_of(rows)}.",
            "Differences: mean ± half width of the paired 95% confidence interval; further from 0 than that",
            "is more than the noise of seeds.",
            f"{self.model} on {self.data}, a mask update every {self.update_every} steps ({updates} in all).",
            self.paper,
            *still_missing(self, rows),
            *([f"{diverged} runs diverged and are left out"] if diverged else []),
        ]

    def rates(self, rows: Sequence[Row], arm: Arm, epochs: int, sparsity: float) -> dict[int, float]:
        """Return R_m in per cent by seed, for the runs that did not diverge."""
        return {
            row["seed"]: 100 * row["exploration_rate"]
            for row in rows
            if (row["optimizer"], row["regrow"], row["epochs"], row["sparsity"]) == (*arm, epochs, sparsity)
            and not row["diverged"]
        }

    @staticmethod
    def _updates(rows: Sequence[Row], epochs: int) -> list[int]:
        return [row["mask_updates"] for row in rows if row["epochs"] == epochs]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw R_m over sparsity, one panel per length of training; below, the difference to masked SGD."""
        figure.set_size_inches(8, 6)
        draw_title(figure, *self._finding(rows), *still_missing(self, rows))
        grid = figure.subplots(
            2, len(self.epochs), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2)
        )
        for column, epochs in enumerate(self.epochs):
            upper, lower = grid[:, column]
            self._draw_rates(upper, rows, epochs)
            self._draw_differences(lower, rows, epochs)
            updates = max(self._updates(rows, epochs), default=0)
            upper.set_title(f"{epochs} epochs, {updates} mask updates", loc="left")
            lower.set_xlabel("sparsity")
            lower.set_xticks(self.sparsities, [f"{s:g}" for s in self.sparsities])
        grid[0, 0].set_ylim(bottom=0)  # after the last panel is drawn, because all share the axis
        grid[0, 0].set_ylabel("weights ever active, R_m (%)")
        grid[1, 0].set_ylabel("R_m minus that of\nmasked SGD (points)")
        figure.legend(
            *legend_of(grid[0]),
            loc="outside lower center",
            ncols=len(ARMS) + 1,
            title=f"{self.model} on {self.data}, {seeds_of(rows)}. g: the gradient, c g: corrected by "
            "Eq. 12.\nAbove: mean ± standard deviation. Below: mean and 95% interval; counted are those "
            "without 0.",
            title_fontsize=8,
        )

    def _draw_rates(self, axes: Axes, rows: Sequence[Row], epochs: int) -> None:
        for arm, label in ARMS.items():
            draw_means(
                axes,
                {s: list(self.rates(rows, arm, epochs, s).values()) for s in self.sparsities},
                color=_COLOURS[arm],
                label=label,
                marker=_MARKERS[arm],
                markersize=4,
                capsize=3,
            )
        initial = [100 * (1 - sparsity) for sparsity in self.sparsities]
        axes.plot(self.sparsities, initial, color="#999999", linestyle=":", label="static masks")

    def _draw_differences(self, axes: Axes, rows: Sequence[Row], epochs: int) -> None:
        axes.axhline(0, color=_COLOURS[BASELINE], linewidth=1)
        width = max(self.sparsities) - min(self.sparsities)
        for shift, arm in zip((-0.015 * width, 0.015 * width), _COMPARED, strict=True):
            for sparsity, d in self._differences(rows, arm, epochs).items():
                style: dict[str, Any] = {"color": _COLOURS[arm], "marker": _MARKERS[arm], "markersize": 4}
                axes.errorbar([sparsity + shift], [d.mean], [d.half_width], capsize=3, **style)

    def _finding(self, rows: Sequence[Row]) -> list[str]:
        """Return sentences that count the settings with more or fewer weights tried than with masked SGD."""
        words = dict(zip(_COMPARED, ("grown by g", "grown by c g"), strict=True))
        said: list[str] = []
        for arm in reversed(_COMPARED):
            found = [d for epochs in self.epochs for d in self._differences(rows, arm, epochs).values()]
            if found:
                counted = f"{beyond_noise(found, 'more weights', 'fewer weights')} settings"
                start = f"{words[arm]}," if said else f"against masked SGD, RigL {words[arm]} tries"
                said.append(f"{start} {counted}")
        if not said:
            return ["no setting has two seeds yet that can be compared with masked SGD"]
        return [*(f"{part};" for part in said[:-1]), said[-1]]

    def _differences(self, rows: Sequence[Row], arm: Arm, epochs: int) -> dict[float, Difference]:
        """Return the difference to masked SGD by sparsity, where there is one."""
        found = {
            s: difference(*(self.rates(rows, a, epochs, s) for a in (arm, BASELINE))) for s in self.sparsities
        }
        return {s: d for s, d in found.items() if d is not None}


class Difference(NamedTuple):
    """A mean difference, and half the width of its 95% confidence interval."""

    mean: float
    half_width: float


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return the mean of ``values - baseline`` over the seeds that both have; None with fewer than two."""
    paired = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if len(paired) < 2:
        return None
    return Difference(mean(paired), t_quantile(len(paired) - 1) * stdev(paired) / sqrt(len(paired)))


FIGURE5 = Exploration(
    name="figure5",
    source="Figure 5, Section 5.2",
    shows="RigL's exploration rate over sparsity, growing by original or corrected gradients (MLP, "
    "Fashion-MNIST; the paper: ResNet-50, ImageNet)",
    paper="The paper: ResNet-50 on ImageNet, every 100 steps; a picture without numbers. Its text: growing\n"
    "by g explores more than masked SGD does, growing by c g biases regrowth and explores less diversely.",
    data="fashion-mnist",
    model="mlp",
    examples=(5000, 1000),
    epochs=(6,),
    update_every=10,
    seconds_per_epoch=0.8,
    seeds=(0, 1, 2),
)
FIGURE10 = Exploration(
    name="figure10",
    source="Figure 10, Appendix B",
    shows="the same for three lengths of training (ResNet-8, digits; the paper: ResNet-20, CIFAR-100)",
    paper="The paper: ResNet-20 on CIFAR-100, 100, 300 and 500 epochs, every 100 steps; a picture without "
    "numbers.",
    data="digits",
    model="resnet8",
    examples=(1200, 600),
    epochs=(2, 6, 10),
    update_every=3,
    seconds_per_epoch=0.3,
    seeds=(0, 1, 2),
    sparsities=(0.9, 0.95, 0.97),
)
