"""What paired differences tell: an interval for their mean, and how many such looks were taken.

Two runs of one seed share initial weights, masks and order of examples: their difference is what is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

FEWEST_PAIRS = 3  # two may agree by chance


class Paired(NamedTuple):
    """The mean of paired differences, in their unit."""

    mean: float
    half_width: float
    """Of the 95% confidence interval; NaN with fewer than ``FEWEST_PAIRS`` pairs, or a NaN among them."""
    p_value: float
    """Two-sided, of no difference (Student's t); below 0.05 where 0 is outside the interval."""

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside the interval."""
        return abs(self.mean) > self.half_width * (1 + 1e-9)


def paired(differences: Sequence[float], resolution: float) -> Paired:
    """The mean of differences and its 95% confidence interval.

    Args:
        differences: one per seed, at least one.
        resolution: the step in which they are measured, in the same unit (one example, say): the interval
            is never narrower to either side, as equal differences are no sign of a small spread then.
    """
    count, middle = len(differences), mean(differences)
    if count < FEWEST_PAIRS or math.isnan(middle):
        return Paired(middle, math.nan, math.nan)
    from scipy.special import stdtr  # installed with the extra "train"

    quantile = t_quantile(count - 1)
    half_width = max(quantile * stdev(differences) / math.sqrt(count), resolution)
    p_value = 2 * float(stdtr(count - 1, -abs(middle) / half_width * quantile))
    return Paired(middle, half_width, p_value)


def t_quantile(degrees_of_freedom: int) -> float:
    """The 97.5% quantile of Student's t distribution."""
    from scipy.special import stdtrit  # installed with the extra "train"

    return float(stdtrit(degrees_of_freedom, 0.975))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number by Holm (1979): one below 0.05 counts, and the chance that any does by
    accident is below 0.05."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted
