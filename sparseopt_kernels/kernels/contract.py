"""What the optimizer hands to a backend: the parameters of one step and the rules to update them by.

A backend is a module with these functions over these types:

    unavailable(device) -> str | None              why it cannot update tensors there (None: it can)
    host_scalars(device) -> bool                   whether it wants all scalars as numbers (below)
    squared_norm(batch) -> Tensor                  sum of (c_i g)^2 over the active weights: 0-d, float64
    step(batch) -> None                            the update rule, in place

Where the CPU would have to wait for an accelerator to know a number, the number stays there: what AMP and
tensor learning rates say comes as tensors on the batch's device, and a kernel reads it. A backend with
``host_scalars`` gets plain numbers instead, and is not called for a step that AMP skips.

What reaches a backend was validated: it raises nothing but errors of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..neurons import Correction, Neurons


@dataclass(slots=True)
class Rule:
    """The hyperparameters of one parameter group at one step.

    A tensor among them is 0-d, on the batch's device and of the type of its arithmetic.
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    correction: Correction
    ham_alpha: float
    ham_beta: float
    gamma: float | Tensor
    """What the gradient is multiplied by besides c_i: the gradient-norm coefficient (Appendix F), and
    1/grad_scale (AMP) where that is no tensor of the batch."""


class Entry:
    """One parameter. The optimizer keeps its entry from step to step and refreshes it.

    ``parameter``, ``momentum_buffer`` (None where momentum is 0) and ``mask`` (None: dense) have one
    shape; complex parameters come as real ones with a last dimension of 2. On the first step the buffer
    is new and holds zeros.

    ``stale`` is True where the parameter or its buffer may hold something other than zero outside the
    mask: on the first step, after the mask changed, after somebody else wrote into one of them. While it
    is False, a backend may leave alone what lies outside the mask.

    ``plan`` is the backend's: what it derived from the mask and the addresses of parameter and buffer. It
    is None again when one of them has changed.
    """

    __slots__ = (
        "buffer_version",
        "first_step",
        "group",
        "ham",
        "mask",
        "mask_place",
        "masked",
        "memory",
        "momentum_buffer",
        "name",
        "neurons",
        "parameter",
        "parameter_version",
        "plan",
        "stale",
    )

    mask: Tensor | None
    momentum_buffer: Tensor | None

    def __init__(self, parameter: Tensor, name: str, group: int, neurons: Neurons, masked: bool) -> None:
        self.parameter = parameter
        self.name = name
        self.group = group
        self.neurons = neurons
        self.masked = masked
        self.ham = parameter.ndim >= 2  # biases and normalisation parameters are left out of HAM
        self.mask = None
        self.momentum_buffer = None
        self.first_step = False
        self.stale = masked
        self.plan: Any = None
        # What the optimizer sees changes by.
        self.memory: tuple[Any, ...] = ()
        self.mask_place = (0, -1)
        self.parameter_version = self.buffer_version = -1


class Batch:
    """The parameters of one step that are on one device and of one dtype.

    ``grads`` are the gradients of ``entries``, strided, in any memory format, possibly of another dtype.
    ``rules`` are those of all parameter groups: ``rules[entry.group]`` is an entry's. ``positions`` are
    those of the entries among the optimizer's parameters. ``plan`` is the backend's; a batch is replaced
    when the plan of one of its entries is None again.

    The rest is None for a backend with ``host_scalars``. For others, ``grad_scale`` and ``found_inf`` are
    GradScaler's, 0-d float32 on the device, or None without one: gradients are divided by the former, and
    nothing at all is written where the latter is not 0. ``flags`` is float32 of shape (number of the
    optimizer's parameters, 2) on the device: ``flags[position]`` is (``first_step``, ``stale``), true where
    not 0. The host may not know them: see ``device_flags``.
    """

    __slots__ = (
        "device",
        "dtype",
        "entries",
        "flags",
        "found_inf",
        "grad_scale",
        "grads",
        "plan",
        "positions",
        "rules",
    )

    grads: list[Tensor]
    rules: list[Rule]

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.entries: list[Entry] = []
        self.positions: list[int] = []
        self.plan: Any = None
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.flags: Tensor | None = None
