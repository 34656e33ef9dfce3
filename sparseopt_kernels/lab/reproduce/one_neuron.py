"""Figures 7 and 8: a neuron that must change the sign of its outer weight to become the teacher.

Figure 7 has a small learning rate, figure 8 a large one; both train for the same time of the flow. The paper
gives neither the distribution of ``w`` nor the number of runs, so there are many seeds, and two scales in
figure 8.
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
    crossings,
    draw_runs,
    flipped,
    found,
    median_step,
    method_label,
    rows_of,
    share,
    trajectories,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In a layer of one neuron, c_i of Eq. 12 is 1: the paper's scaling is D alone.
CORRECTIONS: tuple[Correction, ...] = ("none", "unnormalized")
_SECONDS_PER_STEP = 1e-3
_PAPER = (
    "paper: HAM converges with and without scaling to the ground truth, gradient descent fails; scaling",
    "       improves convergence, especially for the larger learning rate",
)


class OneNeuron:
    """Students of one neuron with the right mask: gradient descent and HAM, with and without scaling.

    ``a`` is -1 at the start, the teacher's is 1. A case trains the students of all seeds side by side; they
    have the same data, teachers and weights in every case.

    Args:
        name: ``figure7`` or ``figure8``.
        lr: the learning rate.
        steps: the number of steps.
        init_stds: standard deviations of the weights ``w`` at the start.
        seeds: of data, teacher and student.
    """

    key = ("init_std", "optimizer", "correction")

    def __init__(
        self,
        name: str,
        lr: float,
        steps: int,
        init_stds: Sequence[float] = (DENSE_STD,),
        seeds: Sequence[int] = tuple(range(20)),
    ) -> None:
        self.name = name
        self.source = f"Figure {name.removeprefix('figure')}, Appendix A.1"
        self.shows = (
            f"a neuron must flip the sign of its outer weight, with gradient descent and HAM (lr {lr:g})"
        )
        self.columns: dict[str, type] = {"init_std": float, "optimizer": str, "correction": str, **COLUMNS}
        self._lr, self._steps, self._init_stds, self._seeds = lr, steps, init_stds, seeds

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """Return all combinations of standard deviation, optimizer and correction."""
        settings = product(self._init_stds, OPTIMIZERS, CORRECTIONS)
        return [dict(zip(self.key, values, strict=True)) for values in settings]

    def seconds(self, case: Case) -> float:
        """Return an estimate that is proportional to the steps."""
        return _SECONDS_PER_STEP * self._steps

    def check(self, settings: Settings) -> None:
        """Do nothing: no data are needed."""

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        """Train the students of all seeds with one method."""
        tasks = new_tasks(self._seeds, neurons=1)
        students = Students(tasks.weights * case["init_std"], torch.full_like(tasks.weights[..., 0], -1.0))
        mask = torch.zeros(1, INPUTS, dtype=torch.bool)
        mask[:, :RELEVANT] = True
        method = Method(self._lr, case["correction"], OPTIMIZERS[case["optimizer"]])
        points = trajectory(students, mask, tasks, method, self._steps)
        return rows_of(case, points, self._seeds, ["sparse"], tasks.directions, self._steps)

    def table(self, rows: Sequence[Row]) -> list[str]:
        """Return the numbers of students that changed the sign of ``a`` and that found the teacher, and the
        steps at which they did."""
        header = (
            "method",
            "std of w",
            "a flipped",
            "at step",
            "found teacher",
            "of starts < 90°",
            "of starts > 90°",
            "at step",
            "end loss",
            "largest drift",
        )
        lines = []
        for optimizer, correction, std in product(OPTIMIZERS, CORRECTIONS, self._init_stds):
            runs = trajectories(rows, optimizer=optimizer, correction=correction, init_std=std)
            if not runs:
                continue
            ends = [run[-1] for run in runs]
            lines.append(
                (
                    method_label(optimizer, correction),
                    f"{std:.2f}",
                    share(ends, flipped),
                    median_step(ends, "flipped_at"),
                    share(ends, found),
                    share([run[-1] for run in runs if run[0]["angle"] < 90], found),
                    share([run[-1] for run in runs if run[0]["angle"] >= 90], found),
                    median_step(ends, "found_at"),
                    f"{statistics.median(end['loss'] for end in ends):.1e}",
                    f"{max(end['drift'] for end in ends):.4f}",
                )
            )
        return [
            *aligned([header, *lines]),
            "medians over seeds; degrees: between w and the teacher's at the start; drift: of the balance",
            *(line for std in self._init_stds for line in _scaling_compared(rows, std)),
            *_PAPER,
            *still_missing(self, rows),
        ]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw loss, ``a`` and the drift of the balance over steps: left gradient descent, right HAM."""
        there = {row["init_std"] for row in rows}
        std = next((std for std in self._init_stds if std in there), self._init_stds[0])
        drawn = [row for row in rows if row["init_std"] == std]
        figure.set_size_inches(8, 7)
        grid = figure.subplots(3, 2, sharex=True, sharey="row", squeeze=False)
        for column, optimizer in enumerate(OPTIMIZERS):
            counts = []
            for correction, colour, width in zip(CORRECTIONS, COLOURS, (2.0, 0.8), strict=True):
                label = CORRECTION_LABELS[correction]
                runs = trajectories(drawn, optimizer=optimizer, correction=correction)
                if runs:
                    counts.append(f"{share([run[-1] for run in runs], found)} {label}")
                for axes, what in zip(grid[:, column], ("loss", "a", "drift"), strict=True):
                    draw_runs(axes, runs, what, colour, label, width)  # widths show both where they coincide
            said = ", ".join(counts) or "no run yet"
            grid[0, column].set_title(f"{OPTIMIZER_LABELS[optimizer]}, teacher found:\n{said}", loc="left")
            grid[1, column].axhline(0, color="#000000", linewidth=0.8, zorder=1)
            grid[2, column].set_xlabel(STEP_LABEL)
        grid[0, 0].set_ylabel("loss (log, cut at 1e-10)")
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(bottom=1e-10)
        grid[1, 0].set_ylabel("outer weight a (teacher: 1)")
        grid[2, 0].set_ylabel("largest drift of\nthe balance so far")
        starts = len({row["seed"] for row in drawn})
        figure.legend(
            *legend_of(grid[0]),
            loc="outside lower center",
            ncols=2,
            title=f"learning rate {self._lr:g}; {starts} starts, with a standard deviation of w of "
            f"{std:.2f}; balance: what Lemmas A.1 and A.3 say is constant",
            title_fontsize=8,
        )
        ends = by_optimizer(drawn, found)
        teacher = only_with(ends, "the teacher is found", "is the teacher found")
        draw_title(figure, f"{crossings(drawn)};", teacher, *still_missing(self, rows))


def _scaling_compared(rows: Sequence[Row], std: float) -> list[str]:
    """Return a line that compares runs from the same starts with and without scaling, with HAM; none if no
    start has both."""
    plain, scaled = (
        {
            run[0]["seed"]: run[-1]
            for run in trajectories(rows, optimizer="ham", correction=correction, init_std=std)
        }
        for correction in CORRECTIONS
    )
    starts = sorted(plain.keys() & scaled.keys())
    if not starts:
        return []
    both = [seed for seed in starts if found(plain[seed]) and found(scaled[seed])]
    sooner = sum(scaled[seed]["found_at"] < plain[seed]["found_at"] for seed in both)
    only_scaled = sum(found(scaled[seed]) and not found(plain[seed]) for seed in starts)
    only_plain = sum(found(plain[seed]) and not found(scaled[seed]) for seed in starts)
    return [
        f"HAM, std {std:.2f}, the same starts: teacher found only with scaling {only_scaled}, only without "
        f"{only_plain}, both {len(both)} (sooner with scaling: {sooner})"
    ]
