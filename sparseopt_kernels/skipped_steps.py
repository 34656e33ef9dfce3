"""Steps that optimizers leave out: what a topology asks for when it updates masks, and what optimizers take.

Neither side knows the other. What they have in common are the masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer

from .kernels.gpu.device import capturing
from .kernels.tensor_memory import memory_of
from .sharding import local_parts


class SkippedStep:
    """A step that each optimizer of these masks leaves out once, until it is withdrawn or nobody has it.

    Args:
        masks: those that were updated, by parameter.
    """

    def __init__(self, masks: Mapping[Parameter, Tensor]) -> None:
        self._masks = [*masks.items()]  # as they are now: they may be gone before an optimizer asks
        self._not_for: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.is_over = False
        """True if an optimizer has left it out."""
        key = id(self)
        PENDING[key] = weakref.ref(self, lambda _: PENDING.pop(key, None))

    def concerns(self, optimizer: Optimizer, masks: Mapping[Parameter, Tensor]) -> bool:
        """Tell if that optimizer, which has these masks, has yet to leave the step out."""
        return optimizer not in self._not_for and any(
            parameter in masks and _is_same(mask, masks[parameter]) for parameter, mask in self._masks
        )

    def take(self, optimizer: Optimizer) -> None:
        """Remember that the optimizer has left it out."""
        self.spare(optimizer)
        self.is_over = True

    def withdraw(self) -> None:
        """Let no optimizer leave it out any more, whoever keeps this object: an exception's traceback may."""
        PENDING.pop(id(self), None)

    def spare(self, optimizer: Optimizer) -> None:
        """Let the optimizer not leave it out."""
        self._not_for.add(optimizer)


PENDING: dict[int, weakref.ref[SkippedStep]] = {}
"""Those that live and were not withdrawn. Most of the time there is none."""


def pending_skips(optimizer: Optimizer, masks: Mapping[Parameter, Tensor]) -> list[SkippedStep]:
    """Return the steps that an optimizer has yet to leave out: all of them by leaving out one.

    Args:
        optimizer: the one that is about to step.
        masks: all that it was given, also those of parameters that it does not update.

    Raises:
        RuntimeError: there is one, and a CUDA graph is being captured.
    """
    pending = [skip for skip in _living() if skip.concerns(optimizer, masks)]
    if pending and capturing():
        raise RuntimeError(
            "the step after an update of the masks is left out (skip_step), and a CUDA graph that is "
            "captured of it would move no weight: make this step and the next outside the graph"
        )
    return pending


def begin(optimizer: Optimizer, *, is_copy: bool = False) -> None:
    """Let a new optimizer leave out no step that another has left out already: the update is over for it.

    A copy of an optimizer leaves out none at all.
    """
    for skip in _living():
        if is_copy or skip.is_over:
            skip.spare(optimizer)


def _living() -> list[SkippedStep]:
    return [skip for reference in [*PENDING.values()] if (skip := reference()) is not None]


def _is_same(mask: Tensor, other: Tensor) -> bool:
    """Tell if both are one tensor, or lie in the same memory alike."""
    return mask is other or memory_of(local_parts([mask])) == memory_of(local_parts([other]))
