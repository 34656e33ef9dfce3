"""Does a mask update turn the gradient, and does Eq. 12 undo it? The claim of Section 3.3, measured directly.

What is measured at a step is in ``skew_probe.py``. Here: of which runs, the table and the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..text_table import aligned
from ..training.config import new_config
from ..training.data import load_dataset
from ..training.run import Run
from .experiment import Case, Row, Settings
from .first_steps import first_losses
from .skew_probe import COLUMNS, QUARTERS, Probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OPTIMIZERS = {"sgd": "masked SGD", "sparseopt": "SparseOpt"}
_METHODS = {"rigl": "RigL", "set": "SET"}
_COLOURS = {"sgd": "#d55e00", "sparseopt": "#0072b2"}  # Okabe and Ito
_GREY = "#999999"
# The gradient that the optimizer goes by: g, or c_i * g.
_APPLIED = {"sgd": "raw", "sparseopt": "corrected"}


@dataclass(frozen=True)
class Skew:
    """An MLP in training, looked at layer by layer: all of its masked layers but the last feed batch norm.

    Args:
        examples: how many for training and for testing.
        epochs: length of a run.
        seeds: of the runs.
        seconds_per_run: with one thread of a current processor.
    """

    examples: tuple[int, int]
    epochs: int
    seeds: tuple[int, ...]
    seconds_per_run: float
    batch_size: int = 64
    data: str = "fashion-mnist"

    name = "skew"
    source = "beyond the paper (its Section 3.3)"
    shows = (
        "how far mask updates turn the gradient, with and without the correction; c_i and turns of neurons"
    )
    key = ("seed", "method", "optimizer", "weight_decay", "update_every")

    @property
    def columns(self) -> Mapping[str, type]:
        return {
            "seed": int,
            "method": str,
            "optimizer": str,
            "weight_decay": float,
            "update_every": int,
            "layer": str,
            "step": int,
            **dict.fromkeys(COLUMNS, float),
        }

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return [
            {
                "seed": seed,
                "method": method,
                "optimizer": optimizer,
                "weight_decay": weight_decay,
                "update_every": update_every,
            }
            for seed in self.seeds
            for method in _METHODS
            for update_every in (25, 100)
            for weight_decay in (0.0, 5e-4)
            for optimizer in _OPTIMIZERS
        ]

    def seconds(self, case: Case) -> float:
        return self.seconds_per_run

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        run = self._run(case, settings)
        probe = Probe(run, [name for name in run.masks.named() if name != "classifier.weight"])
        while not run.done:
            run.train_epoch(probe)
        return [{**case, **row} for row in probe.rows()]

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        return first_losses(self._run(case, settings), steps)

    def _run(self, case: Case, settings: Settings) -> Run:
        config = new_config(
            {
                "data": self.data,
                "model": "mlp",
                "method": case["method"],
                "weight_decay": case["weight_decay"],
                "update_every": case["update_every"],
                "max_grad_norm": None,
                "epochs": self.epochs,
                "warmup_epochs": 1,
                "batch_size": self.batch_size,
                "threads": 1,
                "device": "cpu",
            }
        )
        dataset = load_dataset(self.data, settings.data_dir).first(*self.examples)
        return Run(config, dataset, case["optimizer"], case["seed"])

    def table(self, rows: Sequence[Row]) -> list[str]:
        return [
            *self._table_of_angles(rows),
            "Angles in degrees, means over layers, seeds and weight decays, between gradients of consecutive",
            "steps ('ordinary': what mini-batches alone make of it) and, of one and the same batch, between",
            "its gradients under the old and the new mask. g: raw; c g: each corrected under its own mask.",
            "'scale': of g, what neurons' norms alone account for; 'Eq. 11': that angle as the paper has it.",
            "Exponents of a neuron's gradient over its fan-in, -0.5 in Eq. 11: at the update, and when what",
            "grew has been trained for an interval.",
            "",
            *self._table_of_neurons(rows),
            "c_i: spread is the standard deviation over neurons by their mean. Turns of neurons in a step,",
            "in degrees; predicted: for a norm in equilibrium, sqrt(2 lr weight_decay / (1 + momentum));",
            "'by fan-in': Spearman's correlation. Means over the second half of the run, layers and seeds.",
        ]

    def _table_of_angles(self, rows: Sequence[Row]) -> list[str]:
        columns = {
            "ordinary g": "ordinary_raw",
            "c g": "ordinary_corrected",
            "at updates g": "update_raw",
            "c g ": "update_corrected",
            "same batch g": "same_batch_raw",
            " c g": "same_batch_corrected",
            "scale": "same_batch_scale_alone",
            "Eq. 11": "same_batch_predicted",
        }
        header = ("trained by", *columns, "exponent", "later")
        body = []
        for method, optimizer, every in self._groups():
            own = select(rows, method=method, optimizer=optimizer, update_every=every)
            exponents = (f"{average(own, c):+.2f}" for c in ("same_batch_exponent", "later_exponent"))
            label = f"{_METHODS[method]} every {every}, {_OPTIMIZERS[optimizer]}"
            body.append((label, *(f"{average(own, c):.1f}" for c in columns.values()), *exponents))
        return aligned([header, *body])

    def _table_of_neurons(self, rows: Sequence[Row]) -> list[str]:
        header = ("trained by", "weight decay", "c_i spread", "largest", "turn", "predicted", "by fan-in")
        late = second_half(rows)
        body = []
        for method, optimizer, every in self._groups():
            for weight_decay in (0.0, 5e-4):
                own = select(
                    late, method=method, optimizer=optimizer, update_every=every, weight_decay=weight_decay
                )
                body.append(
                    (
                        f"{_METHODS[method]} every {every}, {_OPTIMIZERS[optimizer]}",
                        f"{weight_decay:g}",
                        f"{average(own, 'c_spread'):.2f}",
                        f"{max((row['c_largest'] for row in own), default=math.nan):.1f}",
                        f"{average(own, 'turn'):.2f}",
                        f"{average(own, 'turn_predicted'):.2f}",
                        f"{average(own, 'turn_rank_correlation'):+.2f}",
                    )
                )
        return aligned([header, *body])

    @staticmethod
    def _groups() -> list[tuple[str, str, int]]:
        return [(m, o, every) for m in _METHODS for every in (25, 100) for o in _OPTIMIZERS]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Above, angles; in the middle, c_i over time; below, turns of neurons."""
        figure.set_size_inches(8, 9.5)
        figure.suptitle(
            "What a mask update does to the gradient, what happens to c_i, how far neurons turn", fontsize=12
        )
        grid = figure.subplots(3, 2)
        self._draw_consecutive(grid[0, 0], rows)
        self._draw_same_batch(grid[0, 1], rows)
        self._draw_over_time(grid[1, 0], rows, "c_spread", fmean)
        grid[1, 0].set_title("Spread of c_i", loc="left")
        grid[1, 0].set_ylabel("standard deviation / mean")
        self._draw_over_time(grid[1, 1], rows, "c_largest", max)
        grid[1, 1].set_title("Largest c_i of a neuron", loc="left")
        grid[1, 1].set_ylabel("largest c_i")
        self._draw_turns_over_time(grid[2, 0], rows)
        self._draw_turns_by_fan_in(grid[2, 1], rows)

    def _draw_consecutive(self, axes: Axes, rows: Sequence[Row]) -> None:
        bars = [
            (f"{_OPTIMIZERS[optimizer]}, {label}", f"{kind}_{_APPLIED[optimizer]}", optimizer, alpha)
            for optimizer in _OPTIMIZERS
            for kind, label, alpha in (("ordinary", "no update", 0.4), ("update", "mask update between", 1.0))
        ]
        for place, (label, column, optimizer, alpha) in enumerate(bars):
            _draw_bars(axes, place, len(bars), select(rows, optimizer=optimizer), column, label,
                       color=_COLOURS[optimizer], alpha=alpha)  # fmt: skip
        axes.set_ylim(0, 145)
        axes.set_title("Two gradients in a row, two batches", loc="left")
        _finish_bars(axes)

    def _draw_same_batch(self, axes: Axes, rows: Sequence[Row]) -> None:
        bars = [
            (f"{name} run: {gradient}", f"same_batch_{column}", optimizer, _COLOURS[optimizer], alpha)
            for optimizer, name in _OPTIMIZERS.items()
            for gradient, column, alpha in (("g", "raw", 0.4), ("c g", "corrected", 1.0))
        ]
        bars.append(("Eq. 11, of masked SGD's g", "same_batch_predicted", "sgd", _GREY, 1.0))
        for place, (label, column, optimizer, color, alpha) in enumerate(bars):
            _draw_bars(axes, place, len(bars), select(rows, optimizer=optimizer), column, label,
                       color=color, alpha=alpha)  # fmt: skip
        axes.set_title("The same batch, old and new mask", loc="left")
        axes.set_ylim(0, 1.6 * axes.get_ylim()[1])
        _finish_bars(axes)

    def _draw_over_time(
        self, axes: Axes, rows: Sequence[Row], column: str, over: Callable[[list[float]], float]
    ) -> None:
        for method, dashes in (("rigl", "-"), ("set", "--")):
            for optimizer in _OPTIMIZERS:
                own = select(rows, method=method, optimizer=optimizer, update_every=25)
                steps = sorted({row["step"] for row in own})
                values = [over([row[column] for row in own if row["step"] == step]) for step in steps]
                axes.plot(
                    steps, values, dashes, color=_COLOURS[optimizer], marker=".",
                    label=f"{_METHODS[method]}, {_OPTIMIZERS[optimizer]}",
                )  # fmt: skip
        axes.set_xlabel("step (a mask update every 25)")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        axes.legend(fontsize=7.5, ncols=2, loc="upper left")

    def _draw_turns_over_time(self, axes: Axes, rows: Sequence[Row]) -> None:
        for weight_decay, dashes in ((5e-4, "-"), (0.0, "--")):
            for optimizer in _OPTIMIZERS:
                own = select(rows, optimizer=optimizer, weight_decay=weight_decay)
                steps = sorted({row["step"] for row in own})
                turns = [average(select(own, step=step), "turn") for step in steps]
                axes.plot(
                    steps, turns, dashes, color=_COLOURS[optimizer], marker=".",
                    label=f"{_OPTIMIZERS[optimizer]}, weight decay {weight_decay:g}",
                )  # fmt: skip
        own = select(rows, weight_decay=5e-4)
        steps = sorted({row["step"] for row in own})
        predicted = [average(select(own, step=step), "turn_predicted") for step in steps]
        axes.plot(steps, predicted, ":", color="black", label="equilibrium at weight decay 0.0005")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("degrees per step")
        axes.set_title("How far a neuron turns in a step", loc="left")
        axes.legend(fontsize=7.5)

    def _draw_turns_by_fan_in(self, axes: Axes, rows: Sequence[Row]) -> None:
        late = second_half(rows)
        quarters = list(range(1, QUARTERS + 1))
        for weight_decay, dashes in ((5e-4, "-"), (0.0, "--")):
            for optimizer in _OPTIMIZERS:
                own = select(late, optimizer=optimizer, weight_decay=weight_decay)
                turns = [average(own, f"turn_quarter_{quarter}") for quarter in quarters]
                axes.plot(quarters, turns, dashes, color=_COLOURS[optimizer], marker="o", markersize=4)
        predicted = average(select(late, weight_decay=5e-4), "turn_predicted")
        axes.plot(quarters, [predicted] * QUARTERS, ":", color="black")
        axes.set_xticks(quarters, ["fewest\ninputs", "2nd", "3rd", "most\ninputs"])
        axes.set_xlabel("quarter of the neurons, by fan-in")
        axes.set_ylabel("degrees per step")
        axes.set_ylim(bottom=0)
        axes.set_title("The same by fan-in, second half of the run", loc="left")


def select(rows: Sequence[Row], **values: object) -> list[Row]:
    """The rows that have these values in these columns."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def average(rows: Sequence[Row], column: str) -> float:
    """The mean of a column where it is known; NaN if it never is."""
    known = [row[column] for row in rows if not math.isnan(row[column])]
    return fmean(known) if known else math.nan


def second_half(rows: Sequence[Row]) -> list[Row]:
    """The rows of the second half of the runs."""
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] > last / 2]


def _draw_bars(
    axes: Axes, place: int, places: int, rows: Sequence[Row], column: str, label: str, **style: Any
) -> None:
    """A bar for each method and interval; ``place`` of ``places`` side by side."""
    width = 0.8 / places
    values = [
        average(select(rows, method=method, update_every=every), column)
        for method in _METHODS
        for every in (25, 100)
    ]
    shift = (place - (places - 1) / 2) * width
    axes.bar([i + shift for i in range(len(values))], values, width, label=label, **style)


def _finish_bars(axes: Axes) -> None:
    labels = [f"{label}\nevery {every}" for label in _METHODS.values() for every in (25, 100)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("angle (degrees)")
    axes.legend(fontsize=7.5, loc="upper left")
    axes.grid(visible=False, axis="x")


SKEW = Skew(examples=(5120, 1000), epochs=8, seeds=(0, 1), seconds_per_run=8.0)
