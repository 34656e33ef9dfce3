"""The rows of figures 6 to 9, about 50 points of each trajectory, and their text and curves.

``student_teacher.py`` computes the trajectories.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from .experiment import Case, Row
from .picture_titles import only_with
from .student_teacher import Point, angles, balance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS: dict[str, type] = {
    "seed": int,
    "neuron": str,
    "step": int,
    "loss": float,
    "a": float,
    "gamma": float,
    "beta": float,
    "angle": float,  # between w and the teacher's, in degrees
    "balance": float,  # the invariant of Lemma A.1 or A.3
    "drift": float,  # the largest distance of the balance from that of step 0, over all steps so far
    "flipped_at": int,  # the step of the last change of sign, -1 while the sign of a is that of step 0
    "found_at": int,  # the first step with the teacher's loss, -1 before it
}
"""The columns of a point; an experiment puts the columns of its cases before them."""
_OF_A_POINT = COLUMNS.keys() - {"seed", "neuron"}
STEP_LABEL = "step (log; linear below 1)"
"""The label of the x axis of ``draw_runs``."""
OPTIMIZERS = {"gd": 0.0, "ham": 4.0}
"""The strength ``alpha`` of HAM for each optimizer (Appendix A.1)."""
OPTIMIZER_LABELS = {"gd": "gradient descent", "ham": "HAM"}
CORRECTION_LABELS = {"none": "not scaled", "unnormalized": "scaled by D", "layer": "scaled by Eq. 12"}
COLOURS = ("#e69f00", "#0072b2")  # the colour-blind can tell them apart, also in grey (Okabe and Ito)
_TEACHERS_LOSS = 1e-4
"""A student with a smaller loss has found the teacher, whose loss is 0. An output of 0 has a loss of about
0.25."""


def rows_of(
    case: Case,
    points: Iterable[Point],
    seeds: Sequence[int],
    neurons: Sequence[str],
    directions: torch.Tensor,
    steps: int,
) -> list[Row]:
    """Return the kept points of a case, ordered by seed, neuron and step.

    Args:
        case: the case, whose ``optimizer`` decides which balance is computed.
        points: the points of all steps from 0 to ``steps``.
        seeds: the seeds of the students.
        neurons: the names of a student's neurons.
        directions: the teachers' weights, ``(students, inputs)``.
        steps: the number of steps.
    """
    ham_alpha = OPTIMIZERS[case["optimizer"]]
    kept = set(kept_steps(steps))
    rows: list[Row] = []
    for point in points:
        balances = balance(point.a, point.gamma, point.beta, ham_alpha)
        if point.step == 0:
            first_a, first_balances = point.a, balances
            drift, flipped_at = torch.zeros_like(balances), torch.full_like(balances, -1)
            found_at = torch.full_like(point.loss, -1)
        drift = torch.maximum(drift, (balances - first_balances).abs())
        flipped = point.a * first_a < 0
        flipped_at = torch.where(flipped & (flipped_at < 0), point.step, flipped_at)
        flipped_at = torch.where(flipped, flipped_at, -1)
        found_at = torch.where((point.loss < _TEACHERS_LOSS) & (found_at < 0), point.step, found_at)
        if point.step not in kept:
            continue
        degrees = angles(point, directions)
        for i, seed in enumerate(seeds):
            for k, name in enumerate(neurons):
                rows.append(
                    {
                        **case,
                        "seed": seed,
                        "neuron": name,
                        "step": point.step,
                        "loss": _rounded(point.loss[i]),
                        "a": _rounded(point.a[i, k]),
                        "gamma": _rounded(point.gamma[i, k]),
                        "beta": _rounded(point.beta[i, k]),
                        "angle": _rounded(degrees[i, k]),
                        "balance": _rounded(balances[i, k]),
                        "drift": _rounded(drift[i, k]),
                        "flipped_at": int(flipped_at[i, k].item()),
                        "found_at": int(found_at[i].item()),
                    }
                )
    # The sort is stable, so the steps stay in order.
    return sorted(rows, key=lambda row: (seeds.index(row["seed"]), neurons.index(row["neuron"])))


def kept_steps(steps: int, count: int = 50) -> list[int]:
    """Return at most ``count`` steps from 0 to ``steps``, both included, at equal logarithmic distances."""
    return sorted({round((steps + 1) ** (i / (count - 1))) - 1 for i in range(count)})


def _rounded(value: torch.Tensor) -> float:
    """Round to six digits: enough for pictures and tables, and a third of the file size."""
    return float(f"{value.item():.6g}")


def trajectories(rows: Sequence[Row], **columns: object) -> list[list[Row]]:
    """Return the rows of each case, seed and neuron that have these values in these columns."""
    runs: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if all(row[name] == value for name, value in columns.items()):
            key = tuple(value for name, value in row.items() if name not in _OF_A_POINT)
            runs.setdefault(key, []).append(row)
    return list(runs.values())


def method_label(optimizer: str, correction: str) -> str:
    """Return a label such as ``HAM, not scaled``."""
    return f"{OPTIMIZER_LABELS[optimizer]}, {CORRECTION_LABELS[correction]}"


def flipped(end: Row) -> bool:
    """Tell if ``a`` has another sign than at the start."""
    return bool(end["flipped_at"] >= 0)


def found(end: Row) -> bool:
    """Tell if the student has found the teacher."""
    return bool(end["found_at"] >= 0)


def share(rows: Sequence[Row], says: Callable[[Row], bool]) -> str:
    """Return the number of rows for which ``says`` is true, such as ``7/10``; ``-`` without rows."""
    return f"{sum(map(says, rows))}/{len(rows)}" if rows else "-"


def by_optimizer(
    rows: Sequence[Row], says: Callable[[Row], bool], **columns: object
) -> dict[str, list[bool]]:
    """Return ``says`` of the last row of each run with these values, by the optimizer's label."""
    return {
        label: [says(run[-1]) for run in trajectories(rows, optimizer=optimizer, **columns)]
        for optimizer, label in OPTIMIZER_LABELS.items()
    }


def crossings(rows: Sequence[Row]) -> str:
    """Return a sentence on the optimizers with which the outer weight crosses zero."""
    inverted = "does the outer weight cross zero"
    return only_with(by_optimizer(rows, flipped), "the outer weight crosses zero", inverted)


def draw_runs(
    axes: Axes, runs: Sequence[list[Row]], column: str, colour: str, label: str, linewidth: float = 1.0
) -> None:
    """Draw a column of each run over its steps, on a logarithmic axis."""
    for i, run in enumerate(runs):
        axes.plot(
            [row["step"] for row in run],
            [row[column] for row in run],
            color=colour,
            linewidth=linewidth,
            alpha=0.7,
            label=label if i == 0 else None,
        )
    if runs:  # panels share the axis, so a panel without runs must not set its limits
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)


def median_step(rows: Sequence[Row], column: str) -> str:
    """Return the median of a column of steps, over the rows that have one; ``-`` if none has."""
    steps = [row[column] for row in rows if row[column] >= 0]
    return f"{statistics.median(steps):.0f}" if steps else "-"
