"""The optimizers of this package that are alive, for those who may not know their class."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer

_ALIVE: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()


def know(optimizer: Optimizer) -> None:
    """Remember an optimizer for as long as it is alive."""
    _ALIVE[id(optimizer)] = optimizer


def is_norm_limited(parameters: Collection[Parameter]) -> bool:
    """Tell if an optimizer limits the norm of the gradients of all these parameters (``max_grad_norm``)."""
    alive = [optimizer for reference in _ALIVE.valuerefs() if (optimizer := reference()) is not None]
    limited = {
        parameter
        for optimizer in alive
        for group in optimizer.param_groups
        if group.get("max_grad_norm") is not None
        for parameter in group["params"]
    }
    return limited.issuperset(parameters)
