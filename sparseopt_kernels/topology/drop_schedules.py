"""Schedules of the fraction of active weights that SET and RigL drop, for their argument ``drop_schedule``.

A schedule is any callable of a step and ``stop_at`` that returns a factor in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable

DropSchedule = Callable[[int, float], float]


def cosine(step: int, stop_at: float) -> float:
    """Return ``(1 + cos(pi * step / stop_at)) / 2``: it falls from 1 to 0 (RigL, Eq. 1).

    It is always 1 if ``stop_at`` is infinite.
    """
    return (1.0 + math.cos(math.pi * step / stop_at)) / 2.0


def constant(step: int, stop_at: float) -> float:
    """Return 1: each update drops the same fraction."""
    return 1.0
