"""Counts weights outside of masks that are not 0: an optimizer that does not know the masks leaves them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .registered_masks import as_boolean


class Outside(NamedTuple):
    """The number of weights outside of a mask, and of those that are not 0."""

    weights: int
    nonzero: int

    @property
    def are_trained(self) -> bool:
        """True if over half of them are not 0: fewer may come from a mask that somebody has just changed."""
        return 2 * self.nonzero > self.weights

    def __str__(self) -> str:
        return f"{self.nonzero:,} of {self.weights:,}"


def count_outside(weight: Tensor, mask: Tensor) -> Outside:
    """Count the weights outside of a mask, boolean or of 0 and 1, of their shape. On a GPU, this waits."""
    outside = ~as_boolean(mask)
    counts = outside.count_nonzero(), (outside & (weight.detach() != 0)).count_nonzero()
    return Outside(*map(int, counts))
