"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment
from .figure2 import Figure2
from .layernorm import LayerNorm
from .prediction import Prediction
from .small import Small

_ALL: tuple[Experiment, ...] = (Figure2(), LayerNorm(), Prediction(), Small())
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
