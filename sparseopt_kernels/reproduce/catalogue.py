"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment
from .exploration import FIGURE5, FIGURE10
from .skew import SKEW

EXPERIMENTS: dict[str, Experiment] = {
    "figure5": FIGURE5,
    "figure10": FIGURE10,
    "skew": SKEW,
}
