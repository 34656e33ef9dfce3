"""The optimizers that masks may have: topologies ask about them, and know none of them."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer

KNOWN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""The optimizers of this process that leave out steps, from when they were made until they are gone."""


def is_norm_limited(parameters: Collection[Parameter]) -> bool:
    """Tell if one of them limits the norm of the gradients of one of the parameters (``max_grad_norm``)."""
    return any(
        group.get("max_grad_norm") is not None and any(p in parameters for p in group["params"])
        for optimizer in [*KNOWN]
        for group in optimizer.param_groups
    )
