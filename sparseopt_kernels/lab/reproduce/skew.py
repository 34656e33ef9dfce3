"""The experiment ``skew``: measures by how much a mask update turns the gradient, and if Eq. 12 undoes it
(the claim of Section 3.3).

``skew_probe.py`` measures each step. Here are the runs, the table and the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...text_table import aligned
from ..training.config import new_config
from ..training.data import load_dataset
from ..training.run import Run
from .experiment import Case, Row, Settings
from .first_steps import UPDATE_EVERY, first_losses
from .interval_picture import legend_of
from .picture_titles import draw_title
from .skew_probe import COLUMNS, QUARTERS, Probe
from .table_text import still_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OPTIMIZERS = {"sgd": "masked SGD", "sparseopt": "SparseOpt"}
_METHODS = {"rigl": "RigL", "set": "SET"}
_COLOURS = {"sgd": "#d55e00", "sparseopt": "#0072b2"}  # Okabe and Ito
_LIGHT = {"sgd": "#eebf99", "sparseopt": "#99c7e0"}
_HATCHES = {"sgd": "", "sparseopt": "///"}
_LINES: dict[str, dict[str, Any]] = {
    optimizer: {"color": _COLOURS[optimizer], "marker": marker, "markersize": 4}
    for optimizer, marker in (("sgd", "o"), ("sparseopt", "^"))
}
_GROUPS = list(product(_METHODS, (25, 100)))
# The gradient that the optimizer applies: g, or c_i * g.
_APPLIED = {"sgd": "raw", "sparseopt": "corrected"}


@dataclass(frozen=True)
class Skew:
    """The experiment: an MLP, measured layer by layer. All of its masked layers but the last feed batch norm.

    Args:
        examples: the numbers of training and test examples.
        epochs: the length of a run.
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
            for method, update_every in _GROUPS
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

    def kept_case(self) -> Case:
        """Return a case of RigL with Eq. 12 and the most frequent mask updates."""
        return max(
            self.cases([]),
            key=lambda case: (
                case["method"] == "rigl",
                case["optimizer"] == "sparseopt",
                -case["update_every"],
            ),
        )

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        return first_losses(self._run({**case, "update_every": UPDATE_EVERY}, settings), steps)

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
            *still_missing(self, rows),
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
        for (method, every), optimizer in product(_GROUPS, _OPTIMIZERS):
            own = select(rows, method=method, optimizer=optimizer, update_every=every)
            if not own:
                continue
            exponents = (_cell(average(own, c), "+.2f") for c in ("same_batch_exponent", "later_exponent"))
            label = f"{_METHODS[method]} every {every}, {_OPTIMIZERS[optimizer]}"
            body.append((label, *(_cell(average(own, c), ".1f") for c in columns.values()), *exponents))
        return aligned([header, *body])

    def _table_of_neurons(self, rows: Sequence[Row]) -> list[str]:
        header = ("trained by", "weight decay", "c_i spread", "largest", "turn", "predicted", "by fan-in")
        late = second_half(rows)
        body = []
        for (method, every), optimizer, weight_decay in product(_GROUPS, _OPTIMIZERS, (0.0, 5e-4)):
            own = select(
                late, method=method, optimizer=optimizer, update_every=every, weight_decay=weight_decay
            )
            if not own:
                continue
            body.append(
                (
                    f"{_METHODS[method]} every {every}, {_OPTIMIZERS[optimizer]}",
                    f"{weight_decay:g}",
                    _cell(average(own, "c_spread"), ".2f"),
                    _cell(max(row["c_largest"] for row in own), ".1f"),
                    _cell(average(own, "turn"), ".2f"),
                    _cell(average(own, "turn_predicted"), ".2f"),
                    _cell(average(own, "turn_rank_correlation"), "+.2f"),
                )
            )
        return aligned([header, *body])

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw angles above, c_i over time in the middle, and turns of neurons below."""
        figure.set_size_inches(8, 9.5)
        draw_title(figure, *self._finding(rows), *still_missing(self, rows))
        parts = figure.subfigures(3, 1, squeeze=False)[:, 0]
        grid = [part.subplots(1, 2) for part in parts]
        self._draw_consecutive(grid[0][0], rows)
        self._draw_same_batch(grid[0][1], rows)
        self._draw_over_time(grid[1][0], rows, "c_spread", fmean, "spread of c_i")
        grid[1][0].set_ylabel("standard deviation / mean")
        self._draw_over_time(grid[1][1], rows, "c_largest", max, "largest c_i")
        grid[1][1].set_ylabel("largest c_i of a neuron")
        self._draw_turns_over_time(grid[2][0], rows)
        self._draw_turns_by_fan_in(grid[2][1], rows)
        for part, (left, _) in zip(parts[1:], grid[1:], strict=True):  # left and right have the same lines
            lines, labels = left.get_legend_handles_labels()
            columns = max(1, (len(lines) + 1) // 2)
            part.legend(
                lines, labels, fontsize=7.5, ncols=columns, handlelength=4, loc="outside lower center"
            )

    def _finding(self, rows: Sequence[Row]) -> list[str]:
        if not rows:
            return ["no run is made yet"]
        runs: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            runs.setdefault(tuple(row[column] for column in self.key), []).append(row)
        raw, corrected = "same_batch_raw", "same_batch_corrected"
        more = sum(average(own, corrected) > average(own, raw) for own in runs.values())
        return [
            "at a mask update, the gradient of one and the same batch turns more",
            f"if it is corrected by Eq. 12 (c g) than if it is not (g): in {more} of {len(runs)} runs",
        ]

    def _draw_consecutive(self, axes: Axes, rows: Sequence[Row]) -> None:
        bars = [
            (f"{name}, {label}", f"{kind}_{_APPLIED[optimizer]}", optimizer, colours)
            for optimizer, name in _OPTIMIZERS.items()
            for kind, label, colours in (
                ("ordinary", "no update", _LIGHT),
                ("update", "mask update between", _COLOURS),
            )
        ]
        heights = _draw_bars(axes, rows, bars)
        axes.set_title(f"two batches, one step apart: {_range(heights)}", loc="left")
        axes.set_ylim(0, 180)
        axes.set_yticks(range(0, 181, 30))
        axes.legend(*legend_of([axes]), fontsize=7.5, loc="upper left")

    def _draw_same_batch(self, axes: Axes, rows: Sequence[Row]) -> None:
        bars = [
            (f"{name} run: {gradient}", f"same_batch_{column}", optimizer, colours)
            for optimizer, name in _OPTIMIZERS.items()
            for gradient, column, colours in (("g", "raw", _LIGHT), ("c g", "corrected", _COLOURS))
        ]
        heights = _draw_bars(axes, rows, bars)
        by_paper = [average(own, "same_batch_predicted") for own in _groups(rows, "sgd")]
        places = [_place(group, 0, len(bars)) for group in range(len(by_paper))]
        if not all(map(math.isnan, by_paper)):
            axes.plot(places, by_paper, "k_", label="Eq. 11, for g of the masked SGD run")
        axes.set_title(f"one batch, old and new mask: {_range(heights)}", loc="left")
        axes.set_ylim(0, 1.8 * axes.get_ylim()[1])
        axes.legend(*legend_of([axes]), fontsize=7.5, loc="upper left")

    def _draw_over_time(
        self, axes: Axes, rows: Sequence[Row], column: str, over: Callable[[list[float]], float], name: str
    ) -> None:
        highest = {}
        for method, dashes in (("rigl", "-"), ("set", "--")):
            for optimizer in _OPTIMIZERS:
                own = select(rows, method=method, optimizer=optimizer, update_every=25)
                if not own:
                    continue
                steps = sorted({row["step"] for row in own})
                values = [over([row[column] for row in own if row["step"] == step]) for step in steps]
                label = f"{_METHODS[method]}, {_OPTIMIZERS[optimizer]}"
                axes.plot(steps, values, dashes, label=label, **_LINES[optimizer])
                highest[label] = max(values)
        most = max(highest, key=lambda label: highest[label], default=None)
        found = "not measured yet" if most is None else f"up to {highest[most]:.2g}, with {most}"
        axes.set_title(f"{name}: {found}", loc="left")
        axes.set_xlabel("step (a mask update every 25)")
        axes.set_ylim(bottom=0)

    def _draw_turns_over_time(self, axes: Axes, rows: Sequence[Row]) -> None:
        steps = sorted({row["step"] for row in rows})
        for weight_decay, dashes in ((5e-4, "-"), (0.0, "--")):
            for optimizer in _OPTIMIZERS:
                own = select(rows, optimizer=optimizer, weight_decay=weight_decay)
                if not own:
                    continue
                turns = [average(select(own, step=step), "turn") for step in steps]
                label = f"{_OPTIMIZERS[optimizer]}, weight decay {weight_decay:g}"
                axes.plot(steps, turns, dashes, label=label, **_LINES[optimizer])
        own = select(rows, weight_decay=5e-4)
        if own:
            predicted = [average(select(own, step=step), "turn_predicted") for step in steps]
            axes.plot(steps, predicted, ":", color="black", label="equilibrium at weight decay 0.0005")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("degrees per step")
        if steps:
            first, last = (average(select(rows, step=step), "turn") for step in (steps[0], steps[-1]))
            axes.set_title(f"turn of a neuron in a step: {first:.2g}° to {last:.2g}°", loc="left")

    def _draw_turns_by_fan_in(self, axes: Axes, rows: Sequence[Row]) -> None:
        late = second_half(rows)
        quarters = list(range(1, QUARTERS + 1))
        for weight_decay, dashes in ((5e-4, "-"), (0.0, "--")):
            for optimizer in _OPTIMIZERS:
                own = select(late, optimizer=optimizer, weight_decay=weight_decay)
                turns = [average(own, f"turn_quarter_{quarter}") for quarter in quarters]
                axes.plot(quarters, turns, dashes, **_LINES[optimizer])
        predicted = average(select(late, weight_decay=5e-4), "turn_predicted")
        axes.plot(quarters, [predicted] * QUARTERS, ":", color="black")
        axes.set_xticks(quarters, ["fewest\ninputs", "2nd", "3rd", "most\ninputs"])
        axes.set_xlabel("quarter of the neurons, by fan-in")
        axes.set_ylabel("degrees per step")
        axes.set_ylim(bottom=0)
        fewest, most = (average(late, f"turn_quarter_{quarter}") for quarter in (1, QUARTERS))
        if late:
            axes.set_title(f"second half: {most - fewest:+.2g}° from fewest to most", loc="left")


def select(rows: Sequence[Row], **values: object) -> list[Row]:
    """Return the rows that have these values in these columns."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def average(rows: Sequence[Row], column: str) -> float:
    """Return the mean of a column over the rows in which it is not NaN; NaN if there are none."""
    known = [row[column] for row in rows if not math.isnan(row[column])]
    return fmean(known) if known else math.nan


def _cell(value: float, spec: str) -> str:
    return "-" if math.isnan(value) else format(value, spec)


def second_half(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the second half of the runs."""
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] > last / 2]


def _groups(rows: Sequence[Row], optimizer: str) -> list[list[Row]]:
    """Return the rows of an optimizer for each method and interval of ``_GROUPS``."""
    own = select(rows, optimizer=optimizer)
    return [select(own, method=method, update_every=every) for method, every in _GROUPS]


def _draw_bars(
    axes: Axes, rows: Sequence[Row], bars: Sequence[tuple[str, str, str, Mapping[str, str]]]
) -> list[float]:
    """Draw bars side by side for each method and interval, and return their heights.

    Args:
        bars: for each bar the label, the column that is averaged, the optimizer of the runs, and the colours.
    """
    heights = []
    for i, (label, column, optimizer, colours) in enumerate(bars):
        values = [average(own, column) for own in _groups(rows, optimizer)]
        if all(map(math.isnan, values)):
            continue
        axes.bar(
            [_place(group, i, len(bars)) for group in range(len(values))],
            values,
            0.8 / len(bars),
            label=label,
            color=colours[optimizer],
            hatch=_HATCHES[optimizer],
            edgecolor="white",
        )
        heights += values
    axes.set_xticks(range(len(_GROUPS)), [f"{_METHODS[m]}\nevery {every}" for m, every in _GROUPS])
    axes.set_xlabel("a mask update every so many steps")
    axes.set_ylabel("angle (degrees)")
    axes.grid(visible=False, axis="x")
    return heights


def _place(group: int, bar: int, bars: int) -> float:
    """Return the x position of the middle of one of ``bars`` bars side by side."""
    return group + (bar - (bars - 1) / 2) * 0.8 / bars


def _range(angles: Sequence[float]) -> str:
    known = [angle for angle in angles if not math.isnan(angle)]
    return f"{min(known):.0f}° to {max(known):.0f}°" if known else "no update yet"


SKEW = Skew(examples=(5120, 1000), epochs=8, seeds=(0, 1), seconds_per_run=8.0)
