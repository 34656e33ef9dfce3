"""``LayerUpdate``: the numbers of weights and neurons that a mask lost and got in an update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..neurons import Neurons, fan_in


class LayerUpdate(NamedTuple):
    """The changes of a layer's mask in an update. A weight that was dropped and grew again does not count."""

    dropped: int = 0
    """The number of weights that left the mask."""
    grown: int = 0
    """The number of weights that are new in it."""
    died: int = 0
    """The number of neurons that lost their last active weight."""
    revived: int = 0
    """The number of neurons that had no active weight, and have one now."""
    most_grown: int = 0
    """The number of new weights of the neuron that got most of them."""

    @property
    def changed(self) -> bool:
        """True if the mask is not as before."""
        return self.dropped > 0 or self.grown > 0

    @property
    def largest_share(self) -> float:
        """The part of the new weights that went to the neuron with most of them, in [0, 1]."""
        return self.most_grown / max(1, self.grown)


def compare_masks(before: Tensor, after: Tensor, neurons: Neurons) -> LayerUpdate:
    """Compare two boolean masks of one layer. On a GPU, this waits for the device once."""
    if not before.numel():
        return LayerUpdate()
    counts = (fan_in(mask, neurons) for mask in (before, after, after & ~before))
    return LayerUpdate(*numbers_of(*counts).tolist())


def numbers_of(former: Tensor, now: Tensor, got: Tensor) -> Tensor:
    """Return the numbers of a ``LayerUpdate``, in its order: int64.

    Args:
        former: the fan-in of each neuron before the update.
        now: the fan-in of each neuron after it.
        got: the number of weights of each neuron that are new.
    """
    lost = former - now + got
    died, revived = (former > 0) & (now == 0), (former == 0) & (now > 0)
    most = got.max() if got.numel() else got.sum()
    return torch.stack([lost.sum(), got.sum(), died.sum(), revived.sum(), most])
