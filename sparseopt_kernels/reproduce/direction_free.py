"""The control of the preconditioner D: a factor of the same size that has no direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..masks import Masks


def layer_scale(mask: Tensor) -> float:
    """Return the square root of a layer's density: ``sqrt(1 - s_avg)``, where D has ``sqrt(1 - s_i)``."""
    return math.sqrt(int(mask.count_nonzero()) / mask.numel())


@torch.no_grad()
def scale_by_layer(masks: Masks) -> None:
    """Multiply the gradient of each masked weight, in place, by its :func:`layer_scale`.

    Called after the step of the topology, which ranks by the gradient as it was, and before the optimizer's.
    """
    for parameter, mask in masks.items():
        if parameter.grad is not None:
            parameter.grad.mul_(layer_scale(mask))
