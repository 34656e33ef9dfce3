"""Figure 9: a neuron with the right mask beside one that has only irrelevant inputs.

The teacher has one neuron. The paper says neither if the scaling is Eq. 12, which is not trivial with two
neurons, or D alone, as in figures 7 and 8, nor with which sign the dense neuron starts. All are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch

from ...correction import Correction
from ...text_table import aligned
from .experiment import Case, Row, Settings
from .interval_picture import legend_of
from .picture_titles import draw_title, only_with
from .student_teacher import DENSE_STD, INPUTS, RELEVANT, Method, Students, new_tasks, trajectory
from .table_text import still_missing
from .trajectory_rows import (
    COLOURS,
    COLUMNS,
    CORRECTION_LABELS,
    OPTIMIZER_LABELS,
    OPTIMIZERS,
    STEP_LABEL,
    by_optimizer,
    draw_runs,
    flipped,
    found,
    method_label,
    rows_of,
    share,
    trajectories,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORRECTIONS: tuple[Correction, ...] = ("none", "unnormalized", "layer")
_DENSE_STARTS = (-1.0, 1.0)
_OFF = 0.05
_SECONDS_PER_STEP = 1.2e-3
_PAPER = (
    "paper: HAM is needed for the sign flip; if we rescale, the dense neuron is turned off, which is not the",
    "       case in the other scenario",
)


class TwoNeurons:
    """The experiment: it measures if the dense neuron is switched off.

    The dense neuron has all inputs but the relevant two, the sparse one those two. ``a`` of the sparse neuron
    starts at -1 (the teacher has 1), that of the dense one at -1 or 1. A case trains the students of all
    seeds side by side.

    Args:
        lr: the learning rate.
        steps: the number of steps.
        seeds: of data, teacher and student.
    """

    name = "figure9"
    source = "Figure 9, Appendix A.1"
    shows = "a dense neuron beside a sparse one with the right mask: does scaling switch it off?"
    key = ("dense_start", "optimizer", "correction")

    def __init__(self, lr: float = 0.1, steps: int = 1000, seeds: Sequence[int] = tuple(range(20))) -> None:
        self.columns: dict[str, type] = {"dense_start": float, "optimizer": str, "correction": str, **COLUMNS}
        self._lr, self._steps, self._seeds = lr, steps, seeds

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """Return all combinations of the dense neuron's start, optimizer and correction."""
        settings = product(_DENSE_STARTS, OPTIMIZERS, CORRECTIONS)
        return [dict(zip(self.key, values, strict=True)) for values in settings]

    def seconds(self, case: Case) -> float:
        """Return an estimate that is proportional to the steps."""
        return _SECONDS_PER_STEP * self._steps

    def check(self, settings: Settings) -> None:
        """Do nothing: no data are needed."""

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        """Train the students of all seeds with one method."""
        tasks = new_tasks(self._seeds, neurons=2)
        a = torch.tensor([case["dense_start"], -1.0], dtype=torch.float64).repeat(len(self._seeds), 1)
        mask = torch.zeros(2, INPUTS, dtype=torch.bool)
        mask[0, RELEVANT:] = True
        mask[1, :RELEVANT] = True
        method = Method(self._lr, case["correction"], OPTIMIZERS[case["optimizer"]])
        points = trajectory(Students(tasks.weights * DENSE_STD, a), mask, tasks, method, self._steps)
        return rows_of(case, points, self._seeds, ["dense", "sparse"], tasks.directions, self._steps)

    def table(self, rows: Sequence[Row]) -> list[str]:
        """Return the numbers of runs in which the dense neuron was switched off, the sparse neuron changed
        sign, and the teacher was found."""
        header = (
            "method",
            "a_dense from",
            f"|a_dense| < {_OFF}",
            "median",
            "a_sparse flipped",
            "found teacher",
            "median loss",
            "largest drift, found",
            "not found",
        )
        lines = []
        for optimizer, correction, start in product(OPTIMIZERS, CORRECTIONS, _DENSE_STARTS):
            ends = [
                run[-1]
                for run in trajectories(rows, optimizer=optimizer, correction=correction, dense_start=start)
            ]
            dense = [end for end in ends if end["neuron"] == "dense"]
            sparse = [end for end in ends if end["neuron"] == "sparse"]
            if not dense or not sparse:
                continue
            lines.append(
                (
                    method_label(optimizer, correction),
                    f"{start:g}",
                    share(dense, _off),
                    f"{statistics.median(abs(end['a']) for end in dense):.3f}",
                    share(sparse, flipped),
                    share(sparse, found),
                    f"{statistics.median(end['loss'] for end in sparse):.1e}",
                    _largest_drift([end for end in ends if found(end)]),
                    _largest_drift([end for end in ends if not found(end)]),
                )
            )
        return [
            *aligned([header, *lines]),
            "drift: of the balance of either neuron, where the teacher was found and where not",
            *(line for correction in CORRECTIONS[1:] for line in _scaling_compared(rows, correction)),
            *_PAPER,
            *still_missing(self, rows),
        ]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw ``a_dense`` over steps: a column for each scaling, a row for each sign at the start."""
        figure.set_size_inches(8, 5.8)
        grid = figure.subplots(len(_DENSE_STARTS), len(CORRECTIONS), sharex=True, sharey=True, squeeze=False)
        for (i, start), (j, correction) in product(enumerate(_DENSE_STARTS), enumerate(CORRECTIONS)):
            axes = grid[i, j]
            for optimizer, colour in zip(OPTIMIZERS, COLOURS, strict=True):
                runs = trajectories(
                    rows, optimizer=optimizer, correction=correction, dense_start=start, neuron="dense"
                )
                draw_runs(axes, runs, "a", colour, OPTIMIZER_LABELS[optimizer])
            off = f"{share([run[-1] for run in runs], _off)} switched off" if runs else "no run yet"
            axes.axhline(0, color="#000000", linewidth=0.8, zorder=1)
            axes.set_title(f"{CORRECTION_LABELS[correction]}\nHAM: {off}", loc="left")
            axes.set_xlabel(STEP_LABEL if i == len(_DENSE_STARTS) - 1 else "")
            axes.set_ylabel(f"outer weight of the dense\nneuron, starting at {start:g}" if j == 0 else "")
        starts = len({row["seed"] for row in rows})
        figure.legend(
            *legend_of(grid.flat),
            loc="outside lower center",
            ncols=len(OPTIMIZERS),
            title=f"learning rate {self._lr:g}; a line for each of {starts} starts; switched off: "
            f"within {_OFF} of 0 at the end",
        )
        ends = by_optimizer(rows, _off, neuron="dense")
        said = only_with(ends, "the dense neuron is switched off", "is the dense neuron switched off")
        by_scaling = [
            f"{sum(_off(run[-1]) for run in runs)} {label}"
            for which, label in CORRECTION_LABELS.items()
            if (runs := trajectories(rows, neuron="dense", correction=which))
        ]
        found_in = [f"{said},", ", ".join(by_scaling)] if by_scaling else [said]
        draw_title(figure, *found_in, *still_missing(self, rows))


def _scaling_compared(rows: Sequence[Row], correction: Correction) -> list[str]:
    """Return a line that compares runs from the same starts with and without this scaling, with HAM; none if
    no start has both."""
    plain, scaled = (
        {
            (run[0]["seed"], run[0]["dense_start"]): _off(run[-1])
            for run in trajectories(rows, optimizer="ham", correction=which, neuron="dense")
        }
        for which in ("none", correction)
    )
    starts = plain.keys() & scaled.keys()
    if not starts:
        return []
    only_scaled = sum(scaled[start] and not plain[start] for start in starts)
    only_plain = sum(plain[start] and not scaled[start] for start in starts)
    both = sum(plain[start] and scaled[start] for start in starts)
    return [
        f"HAM, the same starts, {CORRECTION_LABELS[correction]} or not: dense neuron off only if scaled "
        f"{only_scaled}, only if not {only_plain}, both {both}"
    ]


def _largest_drift(ends: Sequence[Row]) -> str:
    return f"{max(end['drift'] for end in ends):.3f}" if ends else "-"


def _off(end: Row) -> bool:
    return bool(abs(end["a"]) < _OFF)
