"""The weights that have been active at some time, for the exploration rate R_m of ITOP (Liu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.registered_masks import as_boolean
from ..sharding import is_sharded, local_part, sharded_like, whole_counts


class Explored:
    """The union of all masks so far, those at the start included: a boolean tensor for each layer.

    Args:
        masks: the masks at the start, by parameter. Their values may change later.
    """

    def __init__(self, masks: Mapping[Parameter, Tensor]) -> None:
        self._masks = masks
        self._unions = [mask != 0 for mask in masks.values()]

    def unions(self) -> list[Tensor]:
        """Return the unions without the masks of now, on the devices of the masks; they may be written to."""
        pairs = zip(self._unions, self._masks.values(), strict=True)
        self._unions = [sharded_like(union.to(mask.device), mask) for union, mask in pairs]
        return self._unions

    def with_masks(self) -> list[Tensor]:
        """Return copies of the unions with the masks of now, which the user may have written."""
        return [a | as_boolean(mask) for a, mask in zip(self.unions(), self._masks.values(), strict=True)]

    def differs_from_masks(self) -> bool:
        """Return whether a mask is not what has been active so far."""
        pairs = zip(self.unions(), self._masks.values(), strict=True)
        return any(not torch.equal(local_part(union), local_part(mask) != 0) for union, mask in pairs)

    def load(self, unions: Sequence[Tensor]) -> None:
        """Copy unions that were saved.

        Raises:
            ValueError: they are not boolean, or of other shapes than the masks.
        """
        dtypes = {union.dtype for union in unions}
        if dtypes != {torch.bool}:
            raise ValueError(f"state_dict['explored'] has tensors of {dtypes}, they must be torch.bool")
        shapes, own_shapes = ([tuple(own.shape) for own in all_of] for all_of in (unions, self._unions))
        if shapes != own_shapes:
            raise ValueError(f"state_dict has masks of shapes {shapes}, they must be {own_shapes}")
        pairs = [*zip(unions, self._masks.values(), strict=True)]
        if any(is_sharded(union) and not is_sharded(mask) for union, mask in pairs):
            raise ValueError(
                "state_dict['explored'] has sharded tensors, and the masks are not: load it by "
                "torch.distributed.checkpoint, or gather each of its tensors with full_tensor()"
            )
        self._unions = [sharded_like(union.clone().to(mask.device), mask) for union, mask in pairs]


def rate_of(unions: Sequence[Tensor]) -> float:
    """Return the number of weights that are in a union, divided by the number of all weights."""
    counts = whole_counts([int(local_part(own).count_nonzero()) for own in unions], unions)
    return sum(counts) / max(1, sum(own.numel() for own in unions))
