"""Weights outside of masks that are not 0, as an optimizer leaves them that does not know the masks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .registered_masks import as_boolean


def told_if_dense(weights: Iterable[tuple[Tensor, Tensor]]) -> str | None:
    """Return how many weights outside of masks are not 0, if over half of them are not.

    Fewer may come from a mask that somebody has just changed. On a GPU, this waits for the device.

    Args:
        weights: of one model, each with its mask, which is boolean or of 0 and 1. Of sharded ones, the rows
            of this rank.

    Returns:
        For example ``"950 of 1,000 weights outside the masks are not 0"``, or None.
    """
    outside = nonzero = 0
    for weight, mask in weights:
        if weight.is_meta:
            continue
        not_masked = ~as_boolean(mask)
        outside += int(not_masked.count_nonzero())
        nonzero += int((not_masked & (weight.detach() != 0)).count_nonzero())
    if 2 * nonzero <= outside:
        return None
    return f"{nonzero:,} of {outside:,} weights outside the masks are not 0"
