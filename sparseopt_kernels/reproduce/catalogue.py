"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {}
