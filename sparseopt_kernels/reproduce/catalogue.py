"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment
from .tables import TABLES

EXPERIMENTS: dict[str, Experiment] = {
    **TABLES,
}
