"""A hash of a mask, for comparing the masks of several ranks without sending them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..sharding import by_mesh, local_part, shards_of
from ..splitmix import splitmix64


def mask_hash(mask: Tensor, first: int = 0) -> int:
    """Return 64 bits that tell masks apart, the same on every device and in any memory format.

    Each index (row-major) of an active weight is mixed as in SplitMix64, and these numbers are summed.

    Args:
        mask: a mask, or the part of one that is on this rank.
        first: the index of its first weight in the whole mask.
    """
    return int(splitmix64(0, mask.flatten().nonzero().flatten() + first).sum())


def whole_hashes(masks: Sequence[Tensor]) -> list[int]:
    """Return the hash of each mask; of sharded ones that of the whole, and all ranks must call it."""
    shards = dict(enumerate(map(shards_of, masks)))
    hashes = [mask_hash(mask) if shards[i] is None else 0 for i, mask in enumerate(masks)]
    for ranks, places in by_mesh(shards):
        parts = [local_part(masks[i]) for i in places]
        sizes = ranks.integers([part.numel() for part in parts])
        first = ranks.before(sizes)[0].tolist()
        own = [mask_hash(part, index) for part, index in zip(parts, first, strict=True)]
        sums = ranks.sums(ranks.integers(own))
        for i, number in zip(places, sums.tolist(), strict=True):
            hashes[i] = number
    return hashes
