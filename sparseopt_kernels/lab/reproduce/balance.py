"""Figure 6: the curves on which the flows stay (Lemmas A.1 and A.3), and measured trajectories on them.

The students are those of figure 7. ``beta`` does not stay 0 on a trajectory, so the radius
``sqrt(gamma^2 + beta^2)`` takes the place of the paper's ``gamma``. The two lemmas use nothing else of the
normalisation, so that two dimensions suffice where the paper draws three.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING

import torch

from ...text_table import aligned
from .experiment import Case, Row, Settings
from .one_neuron import CORRECTIONS, OneNeuron
from .picture_titles import draw_title
from .student_teacher import DENSE_STD, radius_on_curve
from .table_text import still_missing
from .trajectory_rows import (
    COLOURS,
    CORRECTION_LABELS,
    OPTIMIZER_LABELS,
    OPTIMIZERS,
    crossings,
    method_label,
    trajectories,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = {"none": "o", "unnormalized": "x"}
_PAPER = "paper: a can flip its sign with HAM, which is not possible for balanced gradient flow"


class Balance:
    """The experiment. The curve of gradient descent ends at the origin, that of HAM crosses ``a = 0``.

    Args:
        lr: the learning rate.
        steps: the number of steps.
        seeds: of data, teacher and student.
    """

    name = "figure6"
    source = "Figure 6, Lemmas A.1 and A.3"
    shows = "what gradient descent and HAM leave constant, as curves, and measured trajectories on them"

    def __init__(self, lr: float = 0.01, steps: int = 3000, seeds: Sequence[int] = tuple(range(6))) -> None:
        self._students = OneNeuron("figure7", lr=lr, steps=steps, init_stds=(DENSE_STD,), seeds=seeds)
        self.columns = self._students.columns
        self.key = self._students.key

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """Return the cases of figure 7, with fewer seeds and steps: trajectories pass their curve early."""
        return self._students.cases(rows)

    def seconds(self, case: Case) -> float:
        """Return the estimate of figure 7, which is proportional to the steps."""
        return self._students.seconds(case)

    def check(self, settings: Settings) -> None:
        """Do nothing: no data are needed."""

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        """Return the rows of figure 7."""
        return self._students.measure(case, settings)

    def table(self, rows: Sequence[Row]) -> list[str]:
        """Return the radii at which ``a`` crosses zero, by the lemma and measured."""
        header = (
            "method",
            "balance at start",
            "radius at a = 0, by the lemma",
            "measured",
            "a at the end",
            "largest distance from the curve",
        )
        lines = []
        for optimizer, correction in product(OPTIMIZERS, CORRECTIONS):
            runs = trajectories(rows, optimizer=optimizer, correction=correction)
            if not runs:
                continue
            level, alpha = runs[0][0]["balance"], OPTIMIZERS[optimizer]
            radii = [radius for run in runs if (radius := _radius_at_zero(run)) is not None]
            ends = [run[-1]["a"] for run in runs]
            lines.append(
                (
                    method_label(optimizer, correction),
                    f"{level:.3f}",
                    f"{math.sqrt(max(0.0, -level)):.3f}",
                    f"{statistics.mean(radii):.3f} in {len(radii)}/{len(runs)} runs"
                    if radii
                    else "never there",
                    f"{min(ends):.3f} to {max(ends):.3f}",
                    f"{max(_distance(row, level, alpha) for run in runs for row in run):.4f}",
                )
            )
        return [
            *aligned([header, *lines]),
            "radius: sqrt(gamma^2 + beta^2); where it is 0 at a = 0, the neuron is dead and a cannot pass",
            _PAPER,
            *still_missing(self, rows),
        ]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw the two curves, and the trajectories as points."""
        figure.set_size_inches(8, 5)
        axes = figure.subplots()
        a = torch.linspace(-1.2, 1.2, 481, dtype=torch.float64)
        for (optimizer, alpha), colour in zip(OPTIMIZERS.items(), COLOURS, strict=True):
            runs = trajectories(rows, optimizer=optimizer)
            if not runs:
                continue
            level = runs[0][0]["balance"]
            label = OPTIMIZER_LABELS[optimizer]
            axes.plot(a, radius_on_curve(a, level, alpha), color=colour, label=f"{label}: by the lemma")
            for correction, marker in _MARKERS.items():
                own = [row for run in runs for row in run if row["correction"] == correction]
                if not own:
                    continue
                axes.plot(
                    [row["a"] for row in own],
                    [_radius(row) for row in own],
                    marker,
                    color=colour,
                    markersize=4,
                    markeredgewidth=0.8,
                    markerfacecolor="none",
                    label=f"{label}: measured, {CORRECTION_LABELS[correction]}",
                )
        axes.plot([-1], [1], "k*", markersize=13, linestyle="none", label="start")
        axes.plot([1], [1], "kP", markersize=9, linestyle="none", label="teacher")
        axes.axvline(0, color="#000000", linewidth=0.8, zorder=1)
        axes.set_xlabel("outer weight a")
        axes.set_ylabel("√(gamma² + beta²) of batch norm")
        axes.set_ylim(bottom=-0.02)
        distances = [
            _distance(row, run[0]["balance"], OPTIMIZERS[row["optimizer"]])
            for run in trajectories(rows)
            for row in run
        ]
        if distances:
            apart = f"at most {max(distances):.1g} above or below their curve"
            axes.set_title(f"measured points are {apart}", loc="left")
        figure.legend(loc="outside lower center", ncols=3)
        draw_title(figure, crossings(rows), *still_missing(self, rows))


def _radius(row: Row) -> float:
    return math.hypot(row["gamma"], row["beta"])


def _distance(row: Row, level: float, ham_alpha: float) -> float:
    a = torch.tensor(row["a"], dtype=torch.float64)
    return abs(_radius(row) - float(radius_on_curve(a, level, ham_alpha)))


def _radius_at_zero(run: Sequence[Row]) -> float | None:
    """Return the radius where ``a`` last crossed zero, interpolated linearly between kept points; None if it
    did not."""
    passed = [(before, after) for before, after in pairwise(run) if before["a"] < 0 <= after["a"]]
    if not passed:
        return None
    before, after = passed[-1]
    part: float = before["a"] / (before["a"] - after["a"])
    return _radius(before) + part * (_radius(after) - _radius(before))
