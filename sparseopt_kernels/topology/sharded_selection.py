"""What ``selection.py`` chooses, of sharded layers: nothing is gathered.

Each rank has a block of rows, in the order of the ranks. The ``k``-th largest score of all ranks is found
digit by digit. Each rank counts how many of its candidates have which next 11 bits, and the sums of these
counts tell the digit. After 3 sums of 2048 counts, a score of 32 bits is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sharding import Shards
from .random_choice import choose_random, draw_seed, random_places
from .sharded_parts import DIGIT_BITS, Asked, NativePart, Part, TorchPart, supports


def largest(asked: Sequence[Asked], shards: Shards) -> list[Tensor]:
    """Return exactly ``k`` True at the largest scores of all candidates of each layer; this rank's part.

    Of equal scores, ``first`` comes first, and then the lower index of the whole layer. NaN comes last. All
    ranks call it. For each layer, 3 sums of 16 KB are sent (6 with scores of 64 bits, 2 with those of 16),
    and 16 bytes from each rank to each.
    """
    searches = [_Search(own) for own in asked]
    while any(search.is_open for search in searches):
        counts = torch.stack([search.counts() for search in searches])
        for search, own in zip(searches, shards.sums(counts.to(shards.device())).cpu(), strict=True):
            search.narrow(own)
    ties = shards.integers([search.mark() for search in searches])
    before, totals = shards.before(ties)
    both = zip(searches, before.tolist(), totals.tolist(), strict=True)
    return [search.chosen(own, of_all) for search, own, of_all in both]


class _Search:
    """The search for the ``k``-th largest score of a layer, which all ranks narrow alike."""

    def __init__(self, asked: Asked) -> None:
        self._part: Part = NativePart(asked) if supports(asked) else TorchPart(asked)
        self._shape = asked.values.shape
        self._left = self._part.key_bits if asked.k > 0 else 0  # bits of the key that are not known yet
        self._prefix = 0  # those that are known
        self._k = asked.k  # of those whose keys begin with the prefix, as many are chosen
        self._chooses = asked.k > 0

    @property
    def is_open(self) -> bool:
        """True until the key is known."""
        return self._left > 0

    def counts(self) -> Tensor:
        """Count the candidates of this rank by their next digit: int64, of shape ``(2048,)``."""
        if not self.is_open:
            return torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        return self._part.counts(self._prefix, self._left)

    def narrow(self, counts: Tensor) -> None:
        """Take the counts of all ranks: they tell the next digit of the ``k``-th largest score."""
        if not self.is_open:
            return
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= self._k).sum()) - 1
        self._k -= int(at_least[digit] - counts[digit])
        width = min(DIGIT_BITS, self._left)
        self._prefix = (self._prefix << width) | digit
        self._left -= width

    def mark(self) -> tuple[int, int]:
        """Return how many candidates of this rank have that score: those of ``first``, and the others."""
        return self._part.mark(self._prefix) if self._chooses else (0, 0)

    def chosen(self, before: Sequence[int], totals: Sequence[int]) -> Tensor:
        """Return what is chosen of this rank.

        Args:
            before: the ties of ``first``, and the others, on all ranks before this one.
            totals: the same of all ranks.
        """
        if not self._chooses:
            return torch.zeros(self._shape, dtype=torch.bool, device=self._part.device)
        missing, shares = self._k, []
        for own_before, total in zip(before, totals, strict=True):
            shares.append(max(0, missing - own_before))
            missing -= min(missing, total)
        return self._part.chosen(*shares)


class RandomGrowth(NamedTuple):
    """Uniform random growth in one layer."""

    kept: Tensor
    """The part of this rank; not written."""
    k: int
    """The number of weights that grow in the whole layer."""
    generator: torch.Generator
    """Of the CPU, the same on all ranks."""
    size: int
    """The number of weights of the whole layer."""


def grow_random(
    asked: RandomGrowth, free: int, free_before: int, weights_before: int, shards: Shards
) -> Tensor:
    """Return ``kept`` and ``k`` of the weights of the whole layer that are not kept; this rank's part.

    All ranks draw the same places and keep their own. What is sent are counts of 8 bytes.

    Args:
        asked: the layer.
        free: the number of weights that are not kept, of the whole layer.
        free_before: those on the ranks before this one.
        weights_before: the number of weights of the ranks before this one.
        shards: the ranks that have it.
    """
    seed = draw_seed(asked.generator)
    taken = asked.kept.flatten()
    if not (2 * free >= asked.size and 2 * asked.k <= free):
        chosen = choose_random(free, asked.k, seed)
        own = int((~taken).count_nonzero())
        part = chosen[free_before : free_before + own].to(taken.device)
        return taken.masked_scatter(~taken, part).view(asked.kept.shape)
    taken, full = taken.clone(), asked.size - free + asked.k
    missing, drawn = asked.k, 0
    while missing:
        places = random_places(seed, drawn, missing, asked.size) - weights_before
        places = places[(places >= 0) & (places < taken.numel())]
        taken[places.to(taken.device)] = True
        drawn += missing
        missing = full - int(shards.sums(shards.integers(int(taken.count_nonzero()))))
    return taken.view(asked.kept.shape)
