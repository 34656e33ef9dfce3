"""What the optimizer hands to a backend: the parameters of one step and the rule to update them by.

A backend is a module with three functions over these types:

    unavailable(device_type) -> str | None         why it cannot update tensors there (None: it can)
    squared_norm(entries) -> float                 sum of (c_i g)^2 over the active weights
    step(entries) -> None                          the update rule, in place

The entries of a call are on one device and of one dtype, and were validated: a backend raises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..layers import Neurons
from ..masks import Correction


@dataclass(slots=True)
class Rule:
    """The hyperparameters of one parameter group at one step, as numbers."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    correction: Correction
    ham_alpha: float
    ham_beta: float
    gamma: float
    """What the gradient is multiplied by besides c_i: 1/grad_scale (AMP) times the gradient-norm
    coefficient (Appendix F)."""


class Entry:
    """One parameter of a step. The optimizer keeps an entry from step to step and refreshes it.

    ``parameter``, ``grad``, ``momentum_buffer`` (None where momentum is 0) and ``mask`` (None: dense) have
    one shape; complex parameters come as real ones with a last dimension of 2. On the first step the
    buffer is new and holds zeros.

    ``stale`` is True where the parameter or its buffer may hold something other than zero outside the
    mask: on the first step, after the mask changed, after somebody else wrote into one of them. While it
    is False, a backend may leave alone what lies outside the mask.
    """

    __slots__ = (
        "buffer_version",
        "first_step",
        "grad",
        "ham",
        "mask",
        "mask_version",
        "masked",
        "momentum_buffer",
        "name",
        "neurons",
        "parameter",
        "parameter_version",
        "plan",
        "rule",
        "stale",
    )

    grad: Tensor
    momentum_buffer: Tensor | None
    mask: Tensor | None
    rule: Rule

    def __init__(self, parameter: Tensor, name: str, neurons: Neurons, masked: bool) -> None:
        self.parameter = parameter
        self.name = name
        self.neurons = neurons
        self.masked = masked
        self.ham = parameter.ndim >= 2  # biases and normalisation parameters are left out of HAM
        self.mask = None
        self.momentum_buffer = None
        self.first_step = False
        self.stale = True
        self.mask_version = self.parameter_version = self.buffer_version = -1
        self.plan: Any = None  # what a backend derives from this entry and keeps with it
