"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment
from .figure2 import Figure2
from .layernorm import LayerNorm

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Figure2(),
        LayerNorm(),
    )
}
