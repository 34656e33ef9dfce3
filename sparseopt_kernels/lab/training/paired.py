"""Statistics of paired differences: confidence intervals, p-values and their adjustment for multiple tests.

Two runs of one seed share initial weights, masks and order of examples, so their difference is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

FEWEST_PAIRS = 3  # two differences may be equal by chance


class Paired(NamedTuple):
    """The mean of paired differences and its confidence interval, in their unit."""

    mean: float
    half_width: float
    """Half the width of the 95% confidence interval; NaN with fewer than ``FEWEST_PAIRS`` pairs, or a NaN."""
    p_value: float
    """The two-sided p-value of no difference (Student's t); below 0.05 if 0 is outside the interval."""

    @property
    def beyond_noise(self) -> bool:
        """True if 0 is outside the interval."""
        return abs(self.mean) > self.half_width * (1 + 1e-9)


def paired(differences: Sequence[float], resolution: float) -> Paired:
    """Return the mean of differences and its 95% confidence interval.

    Args:
        differences: one per seed, at least one.
        resolution: the unit in which they are counted (one example, say). The half width is at least this:
            equal differences are no sign of a small spread if they are rounded.
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
    """Return the 97.5% quantile of Student's t distribution."""
    from scipy.special import stdtrit  # installed with the extra "train"

    return float(stdtrit(degrees_of_freedom, 0.975))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests by Holm (1979): if no difference is real, the probability
    that any of them is below 0.05 is at most 0.05."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted
