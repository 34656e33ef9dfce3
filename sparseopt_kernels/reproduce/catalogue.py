"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment
from .prediction import Prediction
from .small import Small

EXPERIMENTS: dict[str, Experiment] = {e.name: e for e in (Small(), Prediction())}
