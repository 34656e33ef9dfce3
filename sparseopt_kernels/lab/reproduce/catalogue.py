"""All experiments, by name."""

from __future__ import annotations

from .appendix_f import AppendixF
from .balance import Balance
from .experiment import Experiment
from .exploration import FIGURE5, FIGURE10
from .figure2 import Figure2
from .layernorm import LayerNorm
from .one_neuron import OneNeuron
from .prediction import Prediction
from .resnet20 import RESNET20
from .skew import SKEW
from .small import Small
from .student_teacher import DENSE_STD
from .tables import TABLES
from .two_neurons import TwoNeurons

_ALL: tuple[Experiment, ...] = (
    Figure2(),
    FIGURE5,
    Balance(),
    OneNeuron("figure7", lr=0.01, steps=10_000),
    OneNeuron("figure8", lr=0.1, steps=1000, init_stds=(DENSE_STD, 1.0)),
    TwoNeurons(),
    FIGURE10,
    LayerNorm(),
    SKEW,
    Small(),
    AppendixF(),
    RESNET20,
    Prediction(),
    *TABLES.values(),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
