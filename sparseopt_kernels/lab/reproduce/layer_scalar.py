"""The control of the preconditioner D: one scalar factor per layer, ``sqrt(1 - s_avg)``, which keeps the
gradient's direction; D has ``sqrt(1 - s_i)`` for each neuron.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...masks.mapping import Masks
from ...sharding import local_part, whole_counts


def layer_scalar(mask: Tensor) -> float:
    """Return the square root of a layer's density: ``sqrt(1 - s_avg)``. If it is sharded, all ranks must call
    it."""
    [active] = whole_counts([int(local_part(mask).count_nonzero())], [mask])
    return math.sqrt(active / mask.numel())


def scale_by_scalar(optimizer: Optimizer, masks: Masks) -> None:
    """Make each step of the optimizer first multiply the gradient of each masked weight by its
    :func:`layer_scalar`, in place.

    RigL ranks gradients before the step, so it sees them unscaled. SET and RigL keep the number of active
    weights of each layer, so the scalars are computed only once, and no step waits for a GPU.
    """
    scalars = [(parameter, layer_scalar(mask)) for parameter, mask in masks.items()]

    @torch.no_grad()
    def scale(*_: object) -> None:
        for parameter, scalar in scalars:
            if parameter.grad is not None:
                parameter.grad.mul_(scalar)

    optimizer.register_step_pre_hook(scale)
