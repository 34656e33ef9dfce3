"""What ``selection.py`` chooses, of sharded layers: nothing is gathered.

Each rank has a block of rows, in the order of the ranks. The ``k``-th largest score of all ranks is found
digit by digit. Each rank counts how many of its candidates have which next 11 bits, and the sums of these
counts tell the digit. After 3 sums of 2048 counts, a score of 32 bits is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sharding import Shards
from ..splitmix import logical_shift
from .random_choice import choose_random, draw_seed, random_places
from .selection import comparable

_DIGIT = 11  # bits


class Asked(NamedTuple):
    """What is to be chosen of one layer."""

    score: Tensor
    """Of the weights of this rank."""
    candidates: Tensor
    """Boolean, of the shape of the score."""
    k: int
    """The number of weights to choose of the whole layer, at most that of all candidates."""
    first: Tensor | None = None
    """Of equal scores, these come before the others."""


def largest(asked: Sequence[Asked], shards: Shards) -> list[Tensor]:
    """Return exactly ``k`` True at the largest scores of all candidates of each layer; this rank's part.

    Of equal scores, ``first`` comes first, and then the lower index of the whole layer. All ranks call it.
    For each layer, 3 sums of 16 KB are sent (6 with scores of 64 bits), and 16 bytes from each rank to each.
    """
    searches = [_Search(own) for own in asked]
    device = shards.device()
    while any(search.is_open for search in searches):
        counts = torch.stack([search.histogram() for search in searches])
        for search, own in zip(searches, shards.sums(counts.to(device)).cpu(), strict=True):
            search.narrow(own)
    ties = torch.stack([search.count_ties() for search in searches])
    before, totals = shards.before(ties.to(device))
    return [
        search.chosen(*own) for search, *own in zip(searches, before.tolist(), totals.tolist(), strict=True)
    ]


class _Search:
    """The search for the ``k``-th largest score of a layer."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._bits = 64 if _has_64_bits(asked.score.dtype) else 32
        self._left = self._bits  # bits that are not known yet
        self._prefix = 0  # those that are known, of the key as an unsigned number
        self._count = asked.k  # of those whose keys begin with the prefix, as many are chosen
        self._rest: Tensor | None = None  # their keys, from the second digit on

    @property
    def is_open(self) -> bool:
        """True until all digits are known."""
        return self._left > 0 and self._asked.k > 0

    def histogram(self) -> Tensor:
        """Count the candidates of this rank by their next digit: int64, of shape ``(2048,)``."""
        if not self.is_open:
            return torch.zeros(1 << _DIGIT, dtype=torch.int64, device=self._asked.score.device)
        keys = self._candidates() if self._rest is None else self._rest
        return torch.bincount(self._digit(keys), minlength=1 << _DIGIT)

    def narrow(self, counts: Tensor) -> None:
        """Take the counts of all ranks, and keep those whose next digit is that of the ``k``-th largest."""
        if not self.is_open:
            return
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= self._count).sum()) - 1
        self._count -= int(at_least[digit] - counts[digit])
        keys = self._candidates() if self._rest is None else self._rest
        self._rest = keys[self._digit(keys) == digit]
        width = min(_DIGIT, self._left)
        self._prefix = (self._prefix << width) | digit
        self._left -= width

    def count_ties(self) -> Tensor:
        """Return how many candidates of this rank have that score: those of ``first``, and the others."""
        _, tied = self._above_and_tied()
        first = self._asked.first
        preferred = tied.new_zeros(tied.shape) if first is None else tied & first
        both = int(preferred.count_nonzero()), int((tied & ~preferred).count_nonzero())
        return torch.tensor(both, dtype=torch.int64, device="cpu")

    def chosen(self, before: Sequence[int], totals: Sequence[int]) -> Tensor:
        """Return what is chosen of this rank.

        Args:
            before: the ties of ``first``, and the others, on all ranks before this one.
            totals: the same of all ranks.
        """
        chosen, tied = self._above_and_tied()
        first = self._asked.first
        preferred = tied.new_zeros(tied.shape) if first is None else tied & first
        missing = self._count
        for places, own_before, total in zip((preferred, tied & ~preferred), before, totals, strict=True):
            own = max(0, missing - own_before)
            chosen.view(-1)[places.flatten().nonzero().flatten()[:own]] = True
            missing -= min(missing, total)
        return chosen

    def _above_and_tied(self) -> tuple[Tensor, Tensor]:
        candidates = self._asked.candidates.contiguous()
        if self._asked.k == 0:
            return torch.zeros_like(candidates), torch.zeros_like(candidates)
        keys = _keys(self._asked.score.contiguous())
        threshold = self._prefix - (1 << (self._bits - 1))
        return (keys > threshold) & candidates, (keys == threshold) & candidates

    def _candidates(self) -> Tensor:
        return _keys(self._asked.score.flatten()[self._asked.candidates.flatten()])

    def _digit(self, keys: Tensor) -> Tensor:
        shift = max(0, self._left - _DIGIT)
        unsigned = keys ^ -(1 << 63) if self._bits == 64 else keys + (1 << 31)
        shifted = logical_shift(unsigned, shift) if shift else unsigned
        return shifted.bitwise_and_((1 << min(_DIGIT, self._left)) - 1)


def _has_64_bits(dtype: torch.dtype) -> bool:
    return dtype == torch.float64 or not dtype.is_floating_point


def _keys(score: Tensor) -> Tensor:
    """Return int64 numbers in the order of the scores; equal scores have equal ones."""
    if not score.is_floating_point():
        return score.long()
    score = comparable(score)
    wide = score if score.dtype == torch.float64 else score.float()
    bits = (wide + 0.0).view(torch.int64 if wide.dtype == torch.float64 else torch.int32)  # -0.0 becomes 0.0
    largest_positive = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ largest_positive, bits).long()


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
        own_count = torch.tensor(int(taken.count_nonzero()), dtype=torch.int64, device=shards.device())
        missing = full - int(shards.sums(own_count))
    return taken.view(asked.kept.shape)


def batches(shards: Mapping[int, Shards]) -> Iterator[tuple[Shards, list[int]]]:
    """Yield each mesh, and the layers that it has, in their order."""
    for ranks in dict.fromkeys(shards.values()):
        yield ranks, [layer for layer, own in shards.items() if own == ranks]
