"""The text of experiments' tables: means in cells, notes below, and the count of missing runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.paired import Paired
    from .experiment import Experiment, Row

WIDTH = 118
"""The characters of a line, in tables and in the notes below them."""


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation as text: the mean alone for one value, ``-`` for none."""
    if not values:
        return "-"
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle


def signed(difference: Paired) -> str:
    """Return a mean difference with the half width of its interval, where there is one: ``+0.52 ± 0.31``."""
    interval = "" if math.isnan(difference.half_width) else f" ± {difference.half_width:.2f}"
    return f"{difference.mean:+.2f}{interval}"


def star(difference: Paired) -> str:
    """Return ``*`` for a difference that is beyond noise, else nothing."""
    return "*" if difference.beyond_noise else ""


def seeds_of(rows: Sequence[Row]) -> str:
    """Return the number of seeds in the rows as text: ``3 seeds``."""
    return fewest_and_most_seeds([{row["seed"] for row in rows}])


def fewest_and_most_seeds(settings: Iterable[Collection[object]]) -> str:
    """Return the numbers of seeds of several settings as text: ``3 seeds``, or ``3 to 5 seeds``.

    Args:
        settings: what each setting has, one for each seed; those without any do not count.
    """
    counts = sorted({len(own) for own in settings} - {0})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds"
    return "one seed" if counts == [1] else f"{sum(counts)} seeds"


def wrapped(text: str) -> list[str]:
    """Return a note as lines of at most ``WIDTH`` characters."""
    return textwrap.wrap(text, WIDTH)


def still_missing(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Return a sentence that counts the known cases without rows, or no sentence if all have some."""
    key = experiment.key
    measured = {tuple(row[name] for name in key) for row in rows}
    cases = [tuple(case[name] for name in key) for case in experiment.cases(rows)]
    missing = sum(case not in measured for case in cases)
    return [f"{missing} of {len(cases)} runs are still to be made"] if missing else []
