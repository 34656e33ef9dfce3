"""Update rules and dtypes that several tests go through."""

from __future__ import annotations

import pytest
import torch
from oracle import Hyper

DTYPES = [
    pytest.param(torch.float64, id="float64"),
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]

EVERYTHING = Hyper(
    lr=0.05,
    momentum=0.9,
    dampening=0.1,
    weight_decay=0.02,
    maximize=True,
    ham_alpha=1.5,
    ham_beta=0.1,
    max_grad_norm=3.0,
)
RULES = [
    pytest.param(Hyper(lr=0.1, weight_decay=0.01), id="no-momentum"),
    pytest.param(Hyper(lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True), id="nesterov"),
    pytest.param(EVERYTHING, id="everything"),
]
