"""Update rules and dtypes that several tests go through."""

from __future__ import annotations

import pytest
import torch
from oracle import Hyper

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in FLOATS]

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
NESTEROV = Hyper(lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True)
RULES = [
    pytest.param(Hyper(lr=0.1, weight_decay=0.01), id="no-momentum"),
    pytest.param(NESTEROV, id="nesterov"),
    pytest.param(EVERYTHING, id="everything"),
]
